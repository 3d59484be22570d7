import { defineConfig } from "vite";

// Two files with fixed names, so that the gateway can embed them (../embed.cmake) and a rebuild is easy to
// compare. index.html is served at "/", the others under "/console/".
export default defineConfig({
  base: "/console/",
  build: {
    outDir: "../dist",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    rollupOptions: {
      output: { entryFileNames: "console.js", assetFileNames: "console[extname]", inlineDynamicImports: true },
    },
  },
  // npm run dev: the page from here, everything else from a running gateway.
  server: {
    proxy: Object.fromEntries(
      ["/v1", "/cluster", "/operator", "/health"].map((path) => [path, process.env.MINKE_URL ?? "http://127.0.0.1:8000"]),
    ),
  },
});
