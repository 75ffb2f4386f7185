"use strict";
// Shows the results that a downloaded report contains.

const report = JSON.parse($("data").textContent);
setCards(report.cards);
for (const [model, name, data] of report.events) addEvent(model, name, data);
