// Code, tables and formulas that are wider than the column scroll sideways. Tab reaches those that do, so that the arrow keys can move them.
const SCROLLS = "article pre, article .table-wrapper, article .math-wrapper, article .cell_output";

function admitTab() {
  for (const part of document.querySelectorAll(SCROLLS)) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}

new ResizeObserver(admitTab).observe(document.body);

// On a phone, going back shows the page, not the contents that were open over it when it was left.
addEventListener("pageshow", () => { document.getElementById("__navigation").checked = false; });
