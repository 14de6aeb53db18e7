"""
The tables of results/README.md, written from the JSON files beside it. Its prose is written by hand.

    python bench.py tables        # fills in every table; prints the files of results/ that no table shows

A line `<!-- MACHINE/NAME: column, column -->` stands before each table: the file results/MACHINE/NAME.json and its columns.
"""
import json
import re
from pathlib import Path

from configurator import UserError

RESULTS = Path(__file__).parent.parent / 'results'
MARK = re.compile(r'(<!-- ([\w.-]+/\w+): (.*?) -->\n)((?:.*\|.*\n)*)')  # and the table that follows


def write(folder=RESULTS):
    """Fill in the tables of results/README.md. UserError where a file or a column is missing."""
    page = folder / 'README.md'
    old = page.read_text(encoding='utf-8')
    new = filled(old, folder)
    page.write_text(new, encoding='utf-8')
    shown = {match[2] for match in MARK.finditer(new)}
    left = sorted(name for file in folder.glob('*/*.json') if (name := f'{file.parent.name}/{file.stem}') not in shown)
    print(f'{page}: {len(shown)} tables' + (f'; not shown: {", ".join(left)}' if left else ''))


def filled(page, folder):
    def table(match):
        mark, name, columns = match[1], match[2], match[3].split(', ')
        try:
            rows = json.loads((folder / f'{name}.json').read_text())['rows']
            return mark + markdown([{column: row[column] for column in columns} for row in rows])
        except OSError as error:
            raise UserError(f'{error.filename}: {error.strerror}')
        except KeyError as error:
            raise UserError(f'{folder / name}.json has no {error}')
    return MARK.sub(table, page)


def markdown(rows):
    """Rows (dicts with the same keys) -> a Markdown table."""
    table = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    return ''.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |\n' for row in table)


def cell(value):
    if isinstance(value, float):
        return f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else str(value)
