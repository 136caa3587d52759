// Before anything is drawn, so that a reader in the dark is not dazzled first.
(() => {
  let kept = null;
  try { kept = localStorage.getItem("lata-theme"); } catch (error) { kept = null; }
  const dark = kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
