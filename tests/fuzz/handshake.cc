// The data plane's handshake. Whatever a stranger sends, nobody without the cluster's secret gets through;
// and a genuine exchange of which a message was changed on its way does not either.
#include "libs/transport/handshake.h"

#include <vector>

#include "tests/fuzz/fuzz.h"

namespace {

using minke::NodeId;
using minke::transport::Identity;
using minke::transport::TransportOptions;
using minke::transport::internal::Handshake;
using minke::wire::Kind;
using minke::wire::TrafficClass;

Identity Node(uint64_t id, const char* secret) {
  Identity identity;
  identity.node_id = NodeId{id};
  identity.model_fingerprint = 7;
  identity.cluster_secret = secret;
  return identity;
}

std::span<const std::byte> Bytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// Alone against the input: kinds and payloads as they come.
void Stranger(minke::fuzz::Input& input, bool initiator) {
  Handshake side(initiator ? Handshake::Side::kInitiator : Handshake::Side::kResponder, Node(1, "ours"), {},
                 TrafficClass::kDecode, NodeId{2});
  if (initiator) (void)side.Start();
  for (int i = 0; i < 8 && !input.empty(); ++i) {
    const Kind kind{input.Take<uint8_t>()};
    const std::string_view payload = input.TakeBytes(input.Take<uint8_t>());
    const Handshake::Step step = side.Receive(kind, Bytes(payload));
    FUZZ_ASSERT(!side.done() && "without the secret");
    if (!step.status.ok()) return;
    if (side.must_decide()) (void)side.Accept();
  }
}

// Two that know the secret, or that do not know the same one, with one message of theirs changed.
void Changed(minke::fuzz::Input& input) {
  const bool same_secret = (input.Take<uint8_t>() & 1) == 0;
  const int which = input.Take<uint8_t>() % 6;
  const auto at = input.Take<uint16_t>();
  const auto flip = input.Take<uint8_t>();
  const auto cut = input.Take<uint8_t>();
  Handshake a(Handshake::Side::kInitiator, Node(1, "ours"), {}, TrafficClass::kDecode, NodeId{2});
  Handshake b(Handshake::Side::kResponder, Node(2, same_secret ? "ours" : "theirs"), {},
              TrafficClass::kDecode);
  Handshake* to = &b;
  Handshake::Message message = a.Start();
  bool changed = false;
  for (int number = 0; number < 8; ++number) {
    if (number == which) {
      const std::vector<std::byte> before = message.payload;
      if (cut < message.payload.size() && cut % 4 == 1) message.payload.resize(cut);
      if (!message.payload.empty()) message.payload[at % message.payload.size()] ^= std::byte{flip};
      changed = message.payload != before;
    }
    const bool was_ack = message.kind == Kind::kAck;
    Handshake::Step step = to->Receive(message.kind, message.payload);
    if (to->must_decide()) step.answer = to->Accept();
    // A last Ack only says that all is well: what it must not do is hide a failure.
    FUZZ_ASSERT(!to->done() || same_secret);
    FUZZ_ASSERT(!to->done() || !changed || was_ack);
    if (!step.status.ok() || !step.answer) break;
    message = *std::move(step.answer);
    to = to == &a ? &b : &a;
  }
  if (same_secret && !changed) FUZZ_ASSERT(a.done() && b.done());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  minke::fuzz::Input input(data, bytes);
  switch (input.Take<uint8_t>() % 3) {
    case 0:
      Stranger(input, true);
      break;
    case 1:
      Stranger(input, false);
      break;
    default:
      Changed(input);
  }
  return 0;
}
