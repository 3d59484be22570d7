// Reads length-prefixed OTLP requests from stdin, decodes them with OpenTelemetry's own protobuf code, and prints their spans.
const { opentelemetry } = require(process.argv[2] + '/node_modules/@opentelemetry/otlp-transformer/build/src/generated/root.js');
const Request = opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest;
const bytes = require('fs').readFileSync(0);
const value = (v) => v.arrayValue ? v.arrayValue.values.map(value)
  : v.stringValue ?? v.boolValue ?? (v.intValue !== undefined ? Number(v.intValue) : v.doubleValue);
const attributes = (list) => Object.fromEntries(list.map((a) => [a.key, value(a.value)]));
const hex = (b) => Buffer.from(b, 'base64').toString('hex');
const spans = [];
for (let at = 0; at < bytes.length;) {
  const size = bytes.readUInt32LE(at);
  const decoded = Request.decode(bytes.subarray(at + 4, at + 4 + size));
  if (Request.verify(Request.toObject(decoded)) !== null) throw new Error('not an ExportTraceServiceRequest');
  const request = Request.toObject(decoded, { bytes: String, longs: String });
  for (const resource of request.resourceSpans) {
    for (const scope of resource.scopeSpans) {
      for (const s of scope.spans) {
        spans.push({ service: attributes(resource.resource.attributes), name: s.name, trace: hex(s.traceId), id: hex(s.spanId),
          parent: hex(s.parentSpanId ?? ''), kind: s.kind, begin: s.startTimeUnixNano, end: s.endTimeUnixNano,
          attributes: attributes(s.attributes ?? []), status: s.status ?? null });
      }
    }
  }
  at += 4 + size;
}
process.stdout.write(JSON.stringify(spans));
