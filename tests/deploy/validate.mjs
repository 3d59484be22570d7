// Runs the schemas' own validators (required fields, patterns, formats) over objects: [[name, module, kind, object], ...] on standard
// input, {name: [complaints]} on standard output.
let text = "";
for await (const chunk of process.stdin) text += chunk;
const out = {};
for (const [name, module, kind, object] of JSON.parse(text)) {
  out[name] = [];
  try {
    new (await import(module))[kind](object).validate();
  } catch (error) {
    out[name].push(String(error.message));
  }
}
console.log(JSON.stringify(out));
