"use strict";
// The theme that is chosen in Airflow's UI, and no theme when it follows the system, as this page then does itself.
function follow() {
  let theme = null;
  try { theme = localStorage.getItem("theme"); } catch { /* then the system's */ }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
follow();
addEventListener("storage", follow);
// In Airflow's UI the page lies on Airflow's own ground.
if (window.top !== window) document.documentElement.dataset.framed = "";

// Airflow frames this page without the right to navigate, so a link is followed by the framing page, which has the same origin.
function visit(event) {
  const link = event.target.closest("a[href]");
  if (!link || window.top === window || "here" in link.dataset || event.button > 1) return;
  const elsewhere = event.button === 1 || event.ctrlKey || event.metaKey || event.shiftKey;
  try {
    const other = parent.document.createElement("a");
    other.href = link.href;
    if (elsewhere) other.target = "_blank";
    other.click();
    event.preventDefault();
  } catch { /* framed by something else: the link is followed in the frame */ }
}
addEventListener("click", visit);
addEventListener("auxclick", visit);

// The backfill form starts the same DAG as Airflow's form, through Airflow's own API and with the user's own rights.
async function start(event) {
  event.preventDefault();
  const form = event.target, fields = form.elements, says = form.querySelector("output"), button = form.querySelector("button");
  const utc = (name) => (fields[name].value ? new Date(`${fields[name].value}Z`).toISOString() : null);
  const whole = fields.mode.value !== "interval backfill";
  const conf = {
    views: [form.dataset.view], store: form.dataset.store, mode: fields.mode.value,
    start: whole ? null : utc("start"), end: whole ? null : utc("end"), dry_run: fields.dry_run.checked,
  };
  button.disabled = true;
  says.className = "soft";
  says.textContent = "Starting …";
  try {
    const answer = await fetch(form.dataset.runs, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ logical_date: null, conf }),
    });
    const told = await answer.json();
    if (!answer.ok) throw new Error(typeof told.detail === "string" ? told.detail : `Airflow answered ${answer.status}`);
    const link = document.createElement("a");
    link.href = form.dataset.ui + encodeURIComponent(told.dag_run_id);
    link.textContent = told.dag_run_id;
    says.replaceChildren("Started: ", link);
  } catch (error) {
    says.className = "bad";
    says.textContent = `Not started. ${error.message}`;
  }
  button.disabled = false;
}
// The interval belongs to one of the modes.
function choose(event) {
  const fields = event.currentTarget.elements;
  for (const name of ["start", "end"]) fields[name].disabled = fields.mode.value !== "interval backfill";
}
addEventListener("DOMContentLoaded", () => {
  for (const form of document.querySelectorAll("form")) {
    form.addEventListener("submit", start);
    form.addEventListener("change", choose);
  }
});

// A page that is looked at is read again, unless somebody has opened something in it.
setInterval(() => {
  if (document.visibilityState === "visible" && !document.querySelector("details[open]")) location.reload();
}, 60000);
