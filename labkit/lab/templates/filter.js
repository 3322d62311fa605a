(() => {
  const form = document.querySelector('.filters');
  const body = document.querySelector('table.ledger tbody');
  const rows = [...body.rows];
  const by = (name) => form.elements[name].value;
  const show = () => {
    let seen = 0;
    for (const row of rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(by('words').toLowerCase())
        && row.dataset.words.includes(by('verdict'))
        && (!by('chapter') || row.dataset.chapter === by('chapter')));
      seen += !row.hidden;
    }
    const order = by('order');
    const key = (row) => order === 'experiment' ? row.dataset.experiment : +row.dataset[order];
    rows.sort((a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1
      : a.dataset.place - b.dataset.place);
    body.append(...rows);
    form.querySelector('output').textContent = seen + ' of ' + rows.length + ' claims';
  };
  form.addEventListener('input', show);
  form.addEventListener('submit', (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
