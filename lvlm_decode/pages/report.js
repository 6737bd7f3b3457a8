"use strict";
(() => {
  const list = byId("list"), space = byId("space");
  const controls = { split: byId("split"), first: byId("first"), second: byId("second"), which: byId("which"), text: byId("text") };
  let split, found = [], selected = -1;

  // --- which answers are shown
  const right = (answer) => (answer ? answer[1] : null);
  const differ = (a, b) => Boolean(a && b) && (a[0] !== b[0] || a[1] !== b[1]);

  function keeps(number) {
    const a = split.answers[controls.first.value][number];
    const b = split.answers[controls.second.value][number];
    switch (controls.which.value) {
      case "right": return right(a) === 1;
      case "wrong": return right(a) === 0;
      case "differ": return differ(a, b);
      case "gained": return right(a) === 1 && right(b) === 0;
      case "lost": return right(a) === 0 && right(b) === 1;
      case "any": {
        const said = new Set(split.answers.map((own) => right(own[number])).filter((v) => v !== null));
        return said.size > 1;
      }
      default: return true;
    }
  }

  function filter() {
    const words = controls.text.value.trim().toLowerCase();
    const a = split.answers[controls.first.value], b = split.answers[controls.second.value];
    found = [];
    for (let number = 0; number < split.questions.length; number++) {
      if (!keeps(number)) continue;
      if (words) {
        const text = [split.questions[number][0], split.questions[number][1], a[number] && a[number][0], b[number] && b[number][0]];
        if (!text.join("\n").toLowerCase().includes(words)) continue;
      }
      found.push(number);
    }
    selected = -1;
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${split.questions.length.toLocaleString("en")} questions.`;
    list.scrollTop = 0;
    draw(true);
  }

  // --- the list: only what is in sight is in the document
  const height = () => (innerWidth <= 640 ? 132 : 112);
  const drawn = new Map();

  function verdict(answer) {
    const v = right(answer);
    return v === null ? make("span", answer ? "–" : "no answer", "neither") : make("span", v ? "right" : "wrong", v ? "right" : "wrong");
  }

  function marked(answer) {
    const box = document.createDocumentFragment();
    const wrong = answer[3] || [];
    if (!wrong.length) box.append(answer[0]);
    else {
      const escaped = wrong.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).sort((x, y) => y.length - x.length);
      answer[0].split(new RegExp(`\\b((?:${escaped.join("|")})s?)\\b`, "i")).forEach((part, i) => box.append(i % 2 ? make("mark", part) : part));
    }
    return box;
  }

  function said(name, answer) {
    const box = make("div");
    box.append(verdict(answer), make("small", name + " "), make("br"));
    if (answer) box.append(marked(answer));
    return box;
  }

  function row(place) {
    const number = found[place], [, text, image, label] = split.questions[number];
    const box = make("div", undefined, "row");
    box.id = "row-" + place;
    box.setAttribute("role", "option");
    box.setAttribute("aria-setsize", found.length);
    box.setAttribute("aria-posinset", place + 1);
    box.setAttribute("aria-selected", place === selected);
    box.style.top = place * height() + "px";
    const picture = image === null ? make("span", undefined, "no") : make("img");
    if (image !== null) Object.assign(picture, { src: data.images[image], alt: "" });
    const question = make("div", text);
    if (label) question.append(make("br"), make("small", "truth: " + label));
    box.append(picture, question);
    for (const control of [controls.first, controls.second])
      box.append(said(split.methods[control.value], split.answers[control.value][number]));
    box.addEventListener("click", () => { select(place); open(place); });
    return box;
  }

  function draw(anew) {
    if (anew) {
      space.replaceChildren();
      drawn.clear();
    }
    const h = height();
    space.style.height = found.length * h + "px";
    const from = Math.max(0, Math.floor(list.scrollTop / h) - 4);
    const to = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / h) + 4);
    for (const [place, node] of drawn)
      if (place < from || place >= to) {
        node.remove();
        drawn.delete(place);
      }
    for (let place = from; place < to; place++)
      if (!drawn.has(place)) {
        drawn.set(place, row(place));
        space.append(drawn.get(place));
      }
  }

  function select(place) {
    if (drawn.has(selected)) drawn.get(selected).setAttribute("aria-selected", "false");
    selected = place;
    const h = height();
    if (place * h < list.scrollTop) list.scrollTop = place * h;
    if ((place + 1) * h > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * h - list.clientHeight;
    draw(false);
    drawn.get(place).setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", "row-" + place);
  }

  list.addEventListener("scroll", () => requestAnimationFrame(() => draw(false)), { passive: true });
  list.addEventListener("keydown", (event) => {
    const page = Math.floor(list.clientHeight / height());
    const to = {
      ArrowDown: selected + 1, ArrowUp: selected - 1, PageDown: selected + page, PageUp: selected - page, Home: 0, End: found.length - 1,
    }[event.key];
    if (event.key === "Enter" && selected >= 0) {
      // The same key would press the button that the opened answer puts the focus on.
      event.preventDefault();
      open(selected);
    }
    if (to === undefined || !found.length) return;
    event.preventDefault();
    select(Math.min(Math.max(to, 0), found.length - 1));
  });

  // --- one question with the answers of all methods
  function open(place) {
    const number = found[place], [id, text, image, label] = split.questions[number];
    const box = byId("one");
    box.replaceChildren();
    if (image !== null) box.append(Object.assign(make("img"), { src: data.images[image], alt: "The image of the question" }));
    const title = make("h3", text || "Question " + id);
    title.id = "one-title";
    box.append(title, make("small", `${split.title}, question ${id}${label ? ". Truth: " + label : ""}`));
    const all = make("dl");
    split.methods.forEach((name, i) => {
      const answer = split.answers[i][number];
      const head = make("dt");
      head.append(verdict(answer), name);
      if (answer && answer[2] && answer[2] !== answer[0]) head.append(`, read as ${answer[2]}`);
      const said = make("dd");
      if (answer) said.append(marked(answer));
      all.append(head, said);
    });
    const close = make("button", "Close");
    close.type = "button";
    close.addEventListener("click", () => box.close());
    box.append(all, close);
    box.showModal();
  }
  byId("one").addEventListener("close", () => list.focus());
  byId("one").addEventListener("click", (event) => { if (event.target === byId("one")) byId("one").close(); });

  // --- the choices
  function choose() {
    split = data.splits[controls.split.value];
    for (const control of [controls.first, controls.second]) {
      const before = control.selectedOptions[0] && control.selectedOptions[0].text;
      control.replaceChildren(...split.methods.map((name, i) => new Option(name, i)));
      const same = split.methods.indexOf(before);
      control.value = same >= 0 ? same : control === controls.first ? split.methods.length - 1 : 0;
    }
    filter();
  }
  data.splits.forEach((one, i) => controls.split.add(new Option(one.title, i)));
  controls.split.addEventListener("change", choose);
  for (const name of ["first", "second", "which"]) controls[name].addEventListener("change", filter);
  controls.text.addEventListener("input", filter);
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", () => draw(true));
  choose();
  document.documentElement.dataset.ready = "true";
})();
