for (const svg of document.querySelectorAll("figure svg")) {
  const [left, right, first, last] = svg.dataset.x.split(",").map(Number);
  const cursor = svg.querySelector(".cursor"), output = svg.parentNode.querySelector("output"), resting = output.textContent;
  const series = [...svg.querySelectorAll("[data-points]")].map(line =>
    [line.dataset.name, line.dataset.points.split(" ").map(point => point.split(","))]);
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = first + (at - left) / (right - left) * (last - first);
    const nearest = series.map(([name, points]) =>
      [name, points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)]);
    const x = left + (nearest[0][1][0] - first) / (last - first) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
    output.textContent = "step " + nearest[0][1][0] + ": " +
      nearest.map(([name, point]) => series.length > 1 ? name + " " + point[1] : point[1]).join(", ");
  };
  svg.onpointerleave = () => { cursor.style.visibility = "hidden"; output.textContent = resting; };
}
