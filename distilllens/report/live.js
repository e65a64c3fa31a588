"use strict";
(() => {
  const seconds = Number(document.documentElement.dataset.refresh);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const focusable = () => all("a, summary, [tabindex]");
  // A place is kept as the last part that begins above the window, and how far above: what is
  // written anew over it may be longer.
  const above = () => all("[id]").filter((part) => part.getBoundingClientRect().top <= 1).pop();

  const remember = () => {
    const part = above();
    history.replaceState({
      part: part ? part.id : "",
      offset: part ? part.getBoundingClientRect().top : -scrollY,
      open: all("details").map((box) => [box.id, box.open]),
      sideways: all(".scroll").map((box) => [box.getAttribute("aria-label"), box.scrollLeft, box.scrollTop]),
      focus: focusable().indexOf(document.activeElement),
    }, "");
  };

  const restore = (kept) => {
    for (const [id, open] of kept.open) {
      const box = document.getElementById(id);
      if (box) box.open = open;
    }
    for (const [name, left, top] of kept.sideways) {
      const box = all(".scroll").find((other) => other.getAttribute("aria-label") === name);
      if (box) box.scrollTo(left, top);
    }
    const part = document.getElementById(kept.part);
    const top = part ? part.getBoundingClientRect().top + scrollY : 0;
    scrollTo({ top: top - kept.offset, behavior: "instant" });
    if (kept.focus >= 0) focusable()[kept.focus]?.focus({ preventScroll: true });
  };

  history.scrollRestoration = "manual";
  const kept = history.state;
  if (kept && kept.open) {
    restore(kept);
    // Once more: a #section in the address moves the window until the page has loaded.
    addEventListener("load", () => requestAnimationFrame(() => restore(kept)));
  }
  addEventListener("pagehide", remember);
  setInterval(() => {
    // Not while nobody looks, nor while somebody marks text to copy it.
    if (document.hidden || String(getSelection())) return;
    remember();
    location.reload();
  }, 1000 * seconds);
})();
