// Everything shown here was written by models or users: text nodes and fixed attribute names only, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function drawing(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- theme ----
const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
function showTheme() {
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", isDark() ? "Switch to the light theme" : "Switch to the dark theme");
}
function stored(value) {
  try { // a file: page may be denied storage
    if (value) localStorage.setItem("rmsd-theme", value);
    return localStorage.getItem("rmsd-theme");
  } catch { return null; }
}
const remembered = stored();
if (remembered === "dark" || remembered === "light") root.dataset.theme = remembered;
$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  stored(root.dataset.theme);
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();
