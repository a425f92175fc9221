// Asks for clips and casts votes. Everything that came from outside goes into the page as text.
"use strict";
const $ = (id) => document.getElementById(id);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function say(id) {
  const slider = $(id);
  if (slider === null) return;
  const show = () => { $(id + "-said").textContent = signed(Number(slider.value)); };
  slider.addEventListener("input", show);
  show();
}
say("score");
say("score-2");

const blind = () => $("two") !== null && $("two").checked;
for (const radio of document.querySelectorAll('input[name="kind"]')) {
  radio.addEventListener("change", () => { if ($("other") !== null) $("other").hidden = !blind(); });
}
if ($("other") !== null) $("other").hidden = !blind(); // a browser may remember what was chosen
$("dice").addEventListener("click", () => { $("seed").value = String(Math.floor(Math.random() * 1e9)); });

async function ask(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}

function scores() {
  if ($("score") === null) return blind() ? [null, null] : [null];
  const first = Number($("score").value);
  return blind() ? [first, Number($("score-2").value)] : [first];
}

function facts(clip) {
  const parts = [clip.system];
  if (clip.score !== null) parts.push("asked for " + signed(clip.score));
  if (clip.reward !== null) parts.push("reward " + signed(clip.reward));
  if (clip.clap_score !== null) parts.push("CLAP score " + signed(clip.clap_score));
  if (clip.lufs !== null) parts.push(clip.lufs.toFixed(1).replace("-", "−") + " LUFS");
  return parts.join(", ");
}

function show(asked, made) {
  const card = $("clip").content.cloneNode(true).querySelector("article");
  card.querySelector("h3").textContent = asked.prompt;
  card.querySelector(".asked").textContent = `seed ${asked.seed}, guidance ${asked.guidance}`;
  const lines = made.clips.map((clip, i) => {
    const player = $("player").content.cloneNode(true).querySelector(".clip");
    const audio = player.querySelector("audio");
    player.querySelector(".name").textContent = made.pair ? String(i + 1) : "";
    audio.src = clip.audio;
    audio.setAttribute("aria-label", made.pair ? `Clip ${i + 1}: ${asked.prompt}` : asked.prompt);
    audio.addEventListener("play", () => { // one at a time
      for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
    });
    const line = player.querySelector(".facts-line");
    line.textContent = made.pair ? "" : facts(clip);
    card.querySelector(".clips").append(player);
    return line;
  });
  if (made.pair) offer(card, made.pair, lines);
  $("clips").prepend(card);
}

function offer(card, pair, lines) {
  const choices = [...card.querySelectorAll(".choices button")];
  const said = card.querySelector(".said");
  card.querySelector(".choices").hidden = false;
  for (const button of choices) {
    button.addEventListener("click", async () => {
      for (const one of choices) one.disabled = true;
      try {
        const answer = await ask("/votes", { pair, choice: button.value });
        button.setAttribute("aria-pressed", "true");
        answer.clips.forEach((clip, i) => { lines[i].textContent = facts(clip); });
        $("votes").textContent = String(answer.votes);
        said.textContent = "Kept.";
      } catch (error) {
        for (const one of choices) one.disabled = false;
        said.textContent = error.message;
      }
    });
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const asked = {
    prompt: $("prompt").value.trim(), seed: Number($("seed").value), guidance: Number($("guidance").value),
    scores: scores(),
  };
  $("make").disabled = true;
  $("status").className = "quiet";
  $("status").textContent = "Making it …";
  try {
    show(asked, await ask("/clips", asked));
    $("status").textContent = "";
  } catch (error) {
    $("status").className = "error";
    $("status").textContent = error.message;
  } finally {
    $("make").disabled = false;
  }
});
