#include "libs/tracing/otlp.h"

#include "proto/otlp/trace.pb.h"

namespace minke::tracing {
namespace {

namespace v1 = otlp::v1;

std::string Bytes(SpanId id) {
  std::string bytes(8, '\0');
  for (size_t i = 8; i-- > 0; id >>= 8) bytes[i] = static_cast<char>(id & 0xff);
  return bytes;
}

uint64_t UnixNanos(Time time) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

void Set(const Value& from, v1::AnyValue* to) {
  if (const auto* text = std::get_if<std::string>(&from)) to->set_string_value(*text);
  if (const auto* number = std::get_if<int64_t>(&from)) to->set_int_value(*number);
  if (const auto* number = std::get_if<double>(&from)) to->set_double_value(*number);
  if (const auto* truth = std::get_if<bool>(&from)) to->set_bool_value(*truth);
  if (const auto* list = std::get_if<std::vector<std::string>>(&from)) {
    for (const std::string& text : *list) to->mutable_array_value()->add_values()->set_string_value(text);
  }
}

v1::Span::SpanKind ToProto(SpanKind kind) {
  switch (kind) {  // no default: a new kind must be named
    case SpanKind::kInternal:
      return v1::Span::SPAN_KIND_INTERNAL;
    case SpanKind::kServer:
      return v1::Span::SPAN_KIND_SERVER;
    case SpanKind::kClient:
      return v1::Span::SPAN_KIND_CLIENT;
  }
  return v1::Span::SPAN_KIND_UNSPECIFIED;
}

template <typename Message>
void Add(const std::string& key, const Value& value, Message* to) {
  v1::KeyValue* attribute = to->add_attributes();
  attribute->set_key(key);
  Set(value, attribute->mutable_value());
}

void Write(const Span& from, v1::Span* to) {
  to->set_trace_id(std::string(from.trace.begin(), from.trace.end()));
  to->set_span_id(Bytes(from.id));
  if (from.parent != 0) to->set_parent_span_id(Bytes(from.parent));
  to->set_name(from.name);
  to->set_kind(ToProto(from.kind));
  to->set_start_time_unix_nano(UnixNanos(from.begin));
  to->set_end_time_unix_nano(UnixNanos(from.end));
  to->set_flags(1);
  for (const auto& [key, value] : from.attributes) Add(key, value, to);
  if (!from.failed) return;
  to->mutable_status()->set_code(v1::Status::STATUS_CODE_ERROR);
  to->mutable_status()->set_message(from.error);
}

}  // namespace

std::string ToOtlp(std::span<const Span> spans, const std::string& service, const std::string& instance) {
  v1::ExportTraceServiceRequest request;
  v1::ResourceSpans* resource = request.add_resource_spans();
  Add("service.name", service, resource->mutable_resource());
  Add("service.version", std::string(MK_VERSION), resource->mutable_resource());
  if (!instance.empty()) Add("service.instance.id", instance, resource->mutable_resource());
  v1::ScopeSpans* scope = resource->add_scope_spans();
  scope->mutable_scope()->set_name("minke");
  scope->mutable_scope()->set_version(MK_VERSION);
  for (const Span& span : spans) Write(span, scope->add_spans());
  return request.SerializeAsString();
}

}  // namespace minke::tracing
