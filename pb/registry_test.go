package pb_test

import (
	"path"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/go-portage/portage/pb"
)

// TestDraftsOwnMessagesBesideOurs registers what an implementation of the draft in the same
// process would: the draft's file name, package and message names. The registry is one for
// the process, and generated code panics at start-up where a name in it is taken.
func TestDraftsOwnMessagesBesideOurs(t *testing.T) {
	for _, ours := range []protoreflect.FileDescriptor{
		pb.File_github_com_go_portage_portage_pb_streammigration_proto,
		pb.File_github_com_go_portage_portage_pb_drain_proto,
	} {
		draft := protodesc.ToFileDescriptorProto(ours)
		draft.Name = proto.String(path.Base(ours.Path()))
		draft.Package = proto.String("streammigration.pb")
		for _, m := range draft.MessageType {
			for _, f := range m.Field {
				if f.GetType() == descriptorpb.FieldDescriptorProto_TYPE_MESSAGE {
					name := protoreflect.FullName(f.GetTypeName()[1:]).Name()
					f.TypeName = proto.String(".streammigration.pb." + string(name))
				}
			}
		}
		file, err := protodesc.NewFile(draft, protoregistry.GlobalFiles)
		require.NoError(t, err)
		require.NoError(t, protoregistry.GlobalFiles.RegisterFile(file))
		for i := range file.Messages().Len() {
			require.NoError(t, protoregistry.GlobalTypes.RegisterMessage(
				dynamicpb.NewMessageType(file.Messages().Get(i))))
		}
	}
}
