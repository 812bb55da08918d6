/* Search, filters and order of the atlas. The best match comes first: exactly the name that is looked
   for, then names that begin so, then names that hold it, then what is found elsewhere. The state
   stands in the address, so it can be shared: #q=llama&norm=RMSNorm. Without this script the page
   shows every row. */
"use strict";

(() => {
  const form = document.querySelector(".atlas-controls");
  const place = document.querySelector(".atlas-rows");
  if (!form || !place) return;
  const rows = [...place.children];
  const count = form.querySelector(".atlas-count");
  const none = document.querySelector(".atlas-none");
  const fields = ["q", "library", "norm", "state", "order"];

  const words = (wanted) => wanted.q.toLowerCase().split(/\s+/).filter(Boolean);

  const shown = (row, wanted) =>
    words(wanted).every((word) => row.dataset.words.includes(word)) &&
    ["library", "state"].every((f) => !wanted[f] || row.dataset[f] === wanted[f]) &&
    (!wanted.norm || row.dataset.norm.split("|").includes(wanted.norm));

  const before = (key) => (a, b) =>
    key === "name"
      ? a.dataset.name.localeCompare(b.dataset.name)
      : Number(b.dataset[key]) - Number(a.dataset[key]);

  /* How far a row is from being called what is looked for. */
  const distance = (row, sought) => {
    const name = row.dataset.name;
    const some = (fits) => sought.some((word) => fits(name, word));
    if (some((said, word) => said === word)) return 0;
    if (some((said, word) => said.startsWith(word))) return 1;
    return some((said, word) => said.includes(word)) ? 2 : 3;
  };

  const nearest = (wanted) => {
    const sought = words(wanted);
    const far = new Map(rows.map((row) => [row, distance(row, sought)]));
    return [...rows].sort((a, b) => far.get(a) - far.get(b));
  };

  const update = () => {
    const wanted = Object.fromEntries(fields.map((f) => [f, form.elements[f].value]));
    let left = 0;
    for (const row of rows) {
      row.hidden = !shown(row, wanted);
      left += !row.hidden;
    }
    place.append(...(wanted.order ? [...rows].sort(before(wanted.order)) : nearest(wanted)));
    count.value = left === rows.length ? `${left} architectures` : `${left} of ${rows.length}`;
    none.hidden = left > 0;
    return wanted;
  };

  const remember = () => {
    const wanted = update();
    const said = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
    history.replaceState(null, "", said.size ? `#${said}` : location.pathname);
  };

  const recall = () => {
    const said = new URLSearchParams(location.hash.slice(1));
    if (!fields.some((f) => said.has(f))) return update();
    for (const f of fields) form.elements[f].value = said.get(f) ?? "";
    update();
    const left = rows.filter((row) => !row.hidden);
    if (left.length === 1) left[0].open = true;
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", remember);
  window.addEventListener("hashchange", recall);
  recall();
})();
