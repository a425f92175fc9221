"use strict";
// Sorting, filtering, players and the blind test. The page is complete without it, but for those.
(() => {
  const $ = (id) => document.getElementById(id);
  const report = JSON.parse($("data").textContent);
  const cards = [...document.querySelectorAll(".prompt")];
  const players = [...document.querySelectorAll("audio")];

  // Storage can be refused, as in some private windows; everything else still works then.
  const store = {
    get(key) { try { return localStorage.getItem(key); } catch { return null; } },
    set(key, value) { try { localStorage.setItem(key, value); return true; } catch { return false; } },
  };

  // Theme
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    $("theme").textContent = theme === "dark" ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `${$("theme").textContent} theme`);
  };
  setTheme(store.get("ttmray-theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!store.get("ttmray-theme")) setTheme(dark.matches ? "dark" : "light"); });
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    store.set("ttmray-theme", theme);
    setTheme(theme);
  });
  for (const id of ["theme", "controls", "setup"]) $(id).hidden = false;

  // Sort and filter
  const number = (text) => (text.trim() === "" ? null : Number(text));
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
  const scoresOf = (prompt, score, system) =>
    prompt.clips.filter((clip) => system === "" || clip.system === Number(system)).map((clip) => clip[score])
      .filter((value) => value !== null && value !== undefined);

  function sortKey(prompt, score, system) {
    if (system.includes("-")) {
      const [a, b] = system.split("-").map((one) => mean(scoresOf(prompt, score, one)));
      return a === null || b === null ? null : a - b;
    }
    return mean(scoresOf(prompt, score, system));
  }

  function arrange() {
    const score = $("sort-score").value, system = $("sort-system").value, order = Number($("order").value);
    const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const low = number($("low").value), high = number($("high").value);
    $("sort-system").disabled = score === "" || score === "text";
    const key = (i) => (score === "" ? i : score === "text" ? report.prompts[i].text : sortKey(report.prompts[i], score, system));
    const keys = cards.map((_, i) => key(i));
    const places = cards.map((_, i) => i).sort((i, j) => {
      if (keys[i] === null || keys[j] === null) return (keys[i] === null) - (keys[j] === null) || i - j;
      const by = typeof keys[i] === "string" ? keys[i].localeCompare(keys[j]) : keys[i] - keys[j];
      return by * order || i - j;
    });
    let shown = 0;
    cards.forEach((card, i) => {
      const prompt = report.prompts[i], text = `${prompt.text} ${prompt.id}`.toLowerCase();
      const inside = (low === null && high === null) || scoresOf(prompt, $("filter-score").value, $("filter-system").value)
        .some((value) => (low === null || value >= low) && (high === null || value <= high));
      card.hidden = !(inside && words.every((word) => text.includes(word)));
      shown += !card.hidden;
      if (card.hidden) card.querySelectorAll("audio").forEach((player) => player.pause());
    });
    const parent = $("prompts");
    if (places.some((i, place) => parent.children[place] !== cards[i])) parent.append(...places.map((i) => cards[i]));
    $("shown").textContent = `${shown} of ${cards.length} prompts`;
  }
  $("controls").addEventListener("input", arrange);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("reset", () => setTimeout(arrange));
  arrange();

  // Players: one at a time; another clip of the same prompt goes on where the last one was
  let last = null;
  for (const player of players) {
    const clip = player.closest(".clip"), card = player.closest(".prompt"), mel = clip.querySelector(".mel");
    player.addEventListener("play", () => {
      if (last && last !== player) {
        if ($("keep").checked && last.closest(".prompt") === card && last.currentTime < last.duration)
          player.currentTime = last.currentTime;
        last.pause();
      }
      last = player;
      clip.classList.add("playing");
    });
    player.addEventListener("pause", () => clip.classList.remove("playing"));
    player.addEventListener("timeupdate", () => {
      if (mel && player.duration) mel.querySelector("span").style.left = `${(100 * player.currentTime) / player.duration}%`;
    });
    if (mel) mel.addEventListener("click", (event) => {
      const box = mel.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      const seek = () => { player.currentTime = share * player.duration; };
      if (player.duration) seek(); else player.addEventListener("loadedmetadata", seek, { once: true });
      player.play();
    });
  }

  // Blind test
  const KEY = `ttmray-votes-${report.id}`;
  const SIDES = ["a", "b"];
  const COLUMNS = ["a", "b", "prompt", "label", "prompt_id", "system_a", "system_b", "seconds", "loudness"];
  const readVotes = () => {
    try { return new Map(JSON.parse(store.get(KEY) || "[]")); } catch { return new Map(); }
  };
  let votes = readVotes();
  let trials = [], trial = null, side = 0, heard = [], listened = 0, since = null, matched = true;
  const audio = SIDES.map(() => Object.assign(new Audio(), { preload: "auto", loop: true }));

  // Order and sides are a function of the seed and the trial alone, so that they do not depend on what was voted before.
  function hash(text) { // FNV-1a over UTF-16 units, with the finaliser of MurmurHash3
    let h = 0x811c9dc5;
    for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  }

  function makeTrials(pair, seed) {
    const made = [];
    for (const prompt of report.prompts) {
      const clips = prompt.clips.filter((clip) => clip.audio);
      clips.forEach((x, i) => clips.slice(i + 1).forEach((y) => {
        if (x.system === y.system || x.sample !== y.sample || x.audio === y.audio) return;
        if (pair !== "" && pair !== `${x.system}-${y.system}`) return;
        const key = JSON.stringify([prompt.id, x.sample, report.systems[x.system], report.systems[y.system]]);
        made.push({ key, prompt, clips: hash(`side ${seed} ${key}`) & 1 ? [y, x] : [x, y], rank: hash(`order ${seed} ${key}`) });
      }));
    }
    return made.sort((x, y) => x.rank - y.rank);
  }

  function saveVotes() {
    if (!store.set(KEY, JSON.stringify([...votes]))) $("hint").textContent = "This browser keeps no votes: export them before you leave.";
    count();
  }

  function count() {
    const all = [...votes.values()], skipped = all.filter((vote) => vote.label === "skip").length;
    $("count").textContent = `${all.length - skipped} votes${skipped ? ` and ${skipped} skipped pairs` : ""} in this browser.`;
    for (const id of ["csv", "json", "clear"]) $(id).disabled = all.length === 0;
    if ($("tally").open) tally();
  }

  function tally() {
    const rows = new Map();
    for (const vote of votes.values()) {
      if (vote.label === "skip") continue;
      const names = [vote.system_a, vote.system_b].sort(), key = JSON.stringify(names);
      const row = rows.get(key) || { names, first: 0, tie: 0, second: 0 };
      if (vote.label === "tie") row.tie += 1;
      else if ((vote.label === "a" ? vote.system_a : vote.system_b) === names[0]) row.first += 1;
      else row.second += 1;
      rows.set(key, row);
    }
    const lines = [...rows.values()].map((row) => {
      const p = document.createElement("p");
      p.textContent = `${row.names[0]} ${row.first}, no difference ${row.tie}, ${row.names[1]} ${row.second}`;
      return p;
    });
    $("tally").querySelector("div").replaceChildren(...lines);
  }
  $("tally").addEventListener("toggle", tally);

  const others = [...document.querySelectorAll("header, footer, main > :not(#blind)")];
  function enter(on) {
    for (const part of others) part.hidden = on;
    $("stage").hidden = !on;
    $("setup").hidden = on;
    if (last) last.pause();
    if (!on) { stop(); trial = null; count(); $("blind-title").focus(); }
    $("blind").scrollIntoView({ behavior: "instant" });
  }

  const open = () => trials.filter((one) => !votes.has(one.key));
  function next() {
    stop();
    const left = open();
    trial = left[0] || null;
    $("progress").max = trials.length || 1;
    $("progress").value = trials.length - left.length;
    $("place").textContent = trial ? `Pair ${trials.length - left.length + 1} of ${trials.length}` : `All ${trials.length} pairs are done.`;
    for (const id of ["side-a", "side-b", "play", "seek"]) $(id).disabled = !trial;
    heard = [false, false];
    listened = 0;
    since = null;
    $("play").textContent = "Play"; // a new source drops the pause event of the old one
    $("stage-prompt").textContent = trial ? trial.prompt.text : "";
    $("hint").textContent = trial ? "Listen to both clips, then vote." : "Leave to export the votes.";
    if (trial) {
      const levels = trial.clips.map((clip) => clip.lufs);
      const quietest = levels.includes(null) ? null : Math.min(...levels);
      audio.forEach((one, i) => {
        one.src = trial.clips[i].audio;
        one.volume = matched && quietest !== null ? 10 ** ((quietest - levels[i]) / 20) : 1;
      });
    } else audio.forEach((one) => one.removeAttribute("src"));
    choose(0);
    allow();
    (trial ? $("play") : $("leave")).focus();
  }

  function allow() {
    for (const button of document.querySelectorAll("[data-vote]"))
      button.disabled = !trial || (button.dataset.vote !== "skip" && !heard.every(Boolean));
    $("undo").disabled = !trials.some((one) => votes.has(one.key));
  }

  function stop() { audio.forEach((one) => one.pause()); }
  function choose(which) {
    side = which;
    SIDES.forEach((name, i) => $(`side-${name}`).setAttribute("aria-pressed", String(i === which)));
  }
  function play() {
    if (trial) audio[side].play().catch((error) => {
      if (error.name !== "AbortError") $("hint").textContent = `This clip cannot be played: ${error.message}`;
    });
  }
  function change(which) {
    if (!trial || which === side) return;
    const playing = !audio[side].paused, at = audio[side].currentTime;
    stop();
    choose(which);
    audio[side].currentTime = at;
    if (playing) play();
  }
  function toggle() { if (audio[side].paused) play(); else audio[side].pause(); }
  function seekTo(seconds) {
    const end = audio[side].duration || 0;
    audio[side].currentTime = Math.max(0, Math.min(seconds, end - 0.05));
  }

  const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
  audio.forEach((one, i) => {
    one.addEventListener("playing", () => {
      since ??= performance.now(); // also fires after a seek or a stall, without a pause before it
      heard[i] = true;
      $("play").textContent = "Pause";
      if (heard.every(Boolean)) $("hint").textContent = "";
      allow();
    });
    one.addEventListener("pause", () => {
      if (since !== null) listened += (performance.now() - since) / 1000;
      since = null;
      $("play").textContent = "Play";
    });
    one.addEventListener("timeupdate", () => {
      if (i !== side || !one.duration) return;
      $("seek").max = one.duration;
      $("seek").value = one.currentTime;
      $("time").textContent = `${clock(one.currentTime)} of ${clock(one.duration)}`;
    });
  });

  function vote(label) {
    if (!trial) return;
    if (label !== "skip" && !heard.every(Boolean)) { $("hint").textContent = "Listen to both clips first."; return; }
    if (since !== null) listened += (performance.now() - since) / 1000;
    const [a, b] = trial.clips;
    votes.set(trial.key, {
      a: a.audio, b: b.audio, prompt: trial.prompt.text, label, prompt_id: trial.prompt.id,
      system_a: report.systems[a.system], system_b: report.systems[b.system],
      seconds: Math.round(listened * 10) / 10, loudness: matched ? "matched" : "as is",
    });
    next();
    saveVotes();
  }

  function undo() {
    const mine = new Set(trials.map((one) => one.key)), voted = [...votes.keys()].filter((key) => mine.has(key));
    if (!voted.length) return;
    votes.delete(voted[voted.length - 1]);
    saveVotes();
    next();
  }

  $("blind-form").addEventListener("submit", (event) => {
    event.preventDefault();
    matched = $("matched").checked;
    votes = readVotes(); // another tab may have voted
    trials = makeTrials($("pair").value, Number($("seed").value));
    enter(true);
    next();
  });
  $("side-a").addEventListener("click", () => change(0));
  $("side-b").addEventListener("click", () => change(1));
  $("play").addEventListener("click", toggle);
  $("seek").addEventListener("input", () => seekTo(Number($("seek").value)));
  $("undo").addEventListener("click", undo);
  $("leave").addEventListener("click", () => enter(false));
  for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => vote(button.dataset.vote));

  document.addEventListener("keydown", (event) => {
    if ($("stage").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const onRange = event.target === $("seek");
    const actions = {
      a: () => vote("a"), b: () => vote("b"), t: () => vote("tie"), s: () => vote("skip"), u: undo,
      x: () => change(1 - side), escape: () => enter(false),
      " ": event.target.tagName === "BUTTON" || onRange ? null : toggle, // a focused button takes it itself
      arrowleft: onRange ? null : () => seekTo(audio[side].currentTime - 2),
      arrowright: onRange ? null : () => seekTo(audio[side].currentTime + 2),
    };
    const action = actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    if (!event.repeat || event.key.startsWith("Arrow")) action();
  });

  function download(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  const rows = () => [...votes.values()].filter((one) => one.label !== "skip");
  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const table = () => [COLUMNS, ...rows().map((row) => COLUMNS.map((name) => row[name]))].map((line) => line.map(cell).join(",")).join("\r\n");
  $("csv").addEventListener("click", () => download(`votes-${report.id}.csv`, "text/csv", `${table()}\r\n`));
  $("json").addEventListener("click", () => download(`votes-${report.id}.json`, "application/json", JSON.stringify(rows(), null, 1)));
  $("clear").addEventListener("click", () => {
    if (!confirm(`Delete ${votes.size} votes from this browser?`)) return;
    votes = new Map();
    saveVotes();
  });
  count();
})();
