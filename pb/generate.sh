#!/bin/sh
# Generates the Go code of the .proto files beside it. Needs protoc (Debian:
# protobuf-compiler); the Go plugin is the one pinned as a tool in go.mod.
set -eu
cd "$(dirname "$0")"
plugin=$(mktemp -d)
trap 'rm -rf "$plugin"' EXIT
go build -o "$plugin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
# The files are registered under their import path, and the messages in packages that
# begin with portage: the registry is one for the whole process, and the draft's own
# names may be taken.
path=github.com/go-portage/portage/pb
PATH="$plugin:$PATH" protoc --proto_path="$path=." --go_out=. --go_opt=module="$path" \
	"$path/streammigration.proto" "$path/drain.proto"
