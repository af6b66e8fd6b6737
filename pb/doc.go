// Package pb holds the wire messages of Portage: those of the stream-migration
// protocol (streammigration.proto) and those of the drain protocol
// (drain.proto). docs/protocol.md says when each is sent.
package pb

//go:generate ./generate.sh
