"use strict";
(() => {
  const body = document.body, pill = document.getElementById("pill"), heard = document.getElementById("heard");
  const part = (name) => document.getElementById(name);
  let source = null, last = "", again = 0, busy = false, once_more = false;

  const show = (words, tone) => {
    pill.firstElementChild.textContent = words;
    pill.className = "pill state " + tone;
  };

  // The page again, of which only those parts are taken that differ: what is open stays open, what has the focus keeps it.
  const reload = async () => {
    if (busy) { once_more = true; return; }
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("[data-part]")) {
        const mine = fresh.querySelector(`[data-part="${old.dataset.part}"]`);
        if (!mine || mine.isEqualNode(old)) continue;
        for (const open of old.querySelectorAll("details[open][id]")) mine.querySelector("#" + open.id)?.setAttribute("open", "");
        const can = "a[href],pre,summary,input,button,[tabindex]";
        const at = [...old.querySelectorAll(can)].indexOf(document.activeElement);
        old.replaceWith(mine);
        if (at >= 0) [...mine.querySelectorAll(can)][at]?.focus({ preventScroll: true });
      }
      const its = fresh.getElementById("pill");
      if (!source && its) show(its.textContent, its.className.replace("pill state ", ""));
      document.title = fresh.title;
      Object.assign(body.dataset, { home: fresh.body.dataset.home, key: fresh.body.dataset.key });
    } catch { show("not connected", "bad"); } finally {
      busy = false;
      if (once_more) { once_more = false; reload(); }
    }
  };

  const condition = (event) => {
    const now = JSON.parse(event.data);
    show(now.pill, now.tone);
    const said = now.expert ? `${now.doing} ${now.expert}` : now.text;
    if (last && last !== said) heard.textContent = said;
    last = said;
    if (part("text")) {
      part("text").firstElementChild.textContent = now.text;
      part("share").hidden = now.share === null;
      part("share").value = now.share ?? 0;
    }
    if (now.key !== body.dataset.key) { body.dataset.key = now.key; reload(); }
  };

  const connect = () => {
    clearTimeout(again);
    if (source || document.hidden) return;
    source = new EventSource(body.dataset.events);
    source.addEventListener("condition", condition);
    source.addEventListener("home", (event) => {
      if (event.data !== body.dataset.home) { body.dataset.home = event.data; reload(); }
    });
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) { show("not connected", "bad"); return; }
      source = null;  // it was refused: too many listen
      again = setTimeout(connect, 15000);
      reload();
    };
  };

  // A page that nobody looks at holds no connection.
  const look = () => {
    if (!document.hidden) { connect(); return; }
    clearTimeout(again);
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", () => { source?.close(); source = null; });
  setInterval(() => { if (!document.hidden) reload(); }, 60000);
  connect();
})();
