// Shows the samples of one step at a time: a slider picks it. Without this script, and on paper, a
// few steps stand there one below the other. On paper, what is folded lies open.
"use strict";

(() => {
  function setUp(group) {
    const steps = [...group.querySelectorAll(".sampled")];
    const last = steps.length - 1;
    const label = document.createElement("label");
    const slider = document.createElement("input");
    const place = document.createElement("output");

    function show() {
      const chosen = Number(slider.value);
      steps.forEach((step, number) => {
        step.hidden = number !== chosen;
      });
      const words = steps[chosen].dataset.words;
      place.textContent = words;
      slider.setAttribute("aria-valuetext", words);
    }

    slider.type = "range";
    slider.min = 0;
    slider.max = last;
    slider.value = last;
    slider.addEventListener("input", show);
    label.className = "picker";
    label.append("Samples ", slider, " ", place);
    if (last > 0) group.prepend(label);
    group.classList.add("picked");
    show();
  }

  document.querySelectorAll(".samples").forEach(setUp);

  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not([open])")];
    for (const details of unfolded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of unfolded) details.open = false;
  });
})();
