const text = document.querySelector(".text"), who = document.getElementById("who");
if (text) {
  const rest = who.textContent;
  const say = (token) => {
    who.textContent = token
      ? `concept ${token.dataset.c} reads it most, ${token.dataset.s} % of it; ${token.dataset.a}`
      : rest;
  };
  let picked = null;
  text.addEventListener("mouseover", (event) => { if (!picked) say(event.target.closest("span")); });
  text.addEventListener("mouseleave", () => { if (!picked) say(null); });
  text.addEventListener("click", (event) => {
    const token = event.target.closest("span");
    picked = token && token.dataset.c !== picked ? token.dataset.c : null;
    text.classList.toggle("picking", picked !== null);
    for (const each of text.querySelectorAll("span")) each.classList.toggle("picked", each.dataset.c === picked);
    say(picked === null ? null : token);
  });
}
