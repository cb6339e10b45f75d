"""JavaScript that a tab runs in its page: to know when the page is quiet, and for acts that are no input events."""

from __future__ import annotations

SHORT_TIMER_MS = 400
"""What a page puts off for no longer than this belongs to the act that caused it."""
TIMERS_MS = 800
"""A page that always has such a timer is waited for no longer than this."""

COUNT_TIMERS = """(() => {
  const set = window.setTimeout.bind(window), clear = window.clearTimeout.bind(window), pending = new Set();
  window.setTimeout = (work, delay, ...rest) => {
    if (typeof work !== 'function' || delay > LIMIT) return set(work, delay, ...rest);
    const id = set((...given) => { pending.delete(id); work.apply(window, given); }, delay, ...rest);
    pending.add(id);
    return id;
  };
  window.clearTimeout = id => { pending.delete(id); clear(id); };
  Object.defineProperty(window, '__pendingTimers', {value: pending});
})()""".replace("LIMIT", str(SHORT_TIMER_MS))
QUIET = """new Promise(done => {
  const end = performance.now() + LIMIT, timers = window.__pendingTimers;
  let frames = 0;
  const look = () => {
    frames = timers && timers.size && performance.now() < end ? 0 : frames + 1;
    frames < 2 ? requestAnimationFrame(look) : done(0);
  };
  requestAnimationFrame(look);
})""".replace("LIMIT", str(TIMERS_MS))
POINT = """function () {
  const rects = [...this.getClientRects()].filter(one => one.width && one.height);
  for (const r of rects)
    for (const [x, y] of [[.5, .5], [.2, .5], [.8, .5], [.5, .2], [.5, .8], [.1, .1], [.9, .9], [.1, .9], [.9, .1]]) {
      const at = [r.left + x * r.width, r.top + y * r.height];
      const top = this.getRootNode().elementFromPoint(...at);
      if (top && this.contains(top)) return at;
    }
  return rects.length ? [rects[0].left + rects[0].width / 2, rects[0].top + rects[0].height / 2] : null;
}"""
"""The middle of the element, or where something else covers that, another place of it that is free."""
SELECT = """function (name) {
  const norm = text => text.replace(/\\s+/g, ' ').trim();
  const option = [...this.options].find(one => norm(one.label || one.text) === name && !one.disabled);
  if (!option) return false;
  if (this.multiple) option.selected = true; else this.value = option.value, option.selected = true;
  this.dispatchEvent(new Event('input', {bubbles: true}));
  this.dispatchEvent(new Event('change', {bubbles: true}));
  return true;
}"""
EMPTY = """function () {
  this.focus();
  if (typeof this.select === 'function') this.select();
  else getSelection().selectAllChildren(this);
  const editable = this.isContentEditable || (['INPUT', 'TEXTAREA'].includes(this.tagName) && !this.readOnly);
  return editable && !this.disabled;
}"""
SET_DATE = """function (text) {
  this.value = text;
  this.dispatchEvent(new Event('input', {bubbles: true}));
  this.dispatchEvent(new Event('change', {bubbles: true}));
  return this.value === text;
}"""
