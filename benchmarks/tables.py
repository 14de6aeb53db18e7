"""
The tables of results/README.md, written from the JSON files beside it. Its prose is written by hand.

    python bench.py tables        # fill in every table, and print which files of results/ no table shows

A line `<!-- MACHINE/NAME: column, column -->` stands before each table: the file results/MACHINE/NAME.json and its
columns.
"""
import re
from pathlib import Path

from configurator import UserError, read_json
from files import replacing

RESULTS = Path(__file__).parent.parent / 'results'
MARK = re.compile(r'(<!-- ([\w.-]+/\w+): (.*?) -->\n)((?:.*\|.*\n)*)')  # and the table that follows


def write(folder):
    """
    Fill in the tables of the folder's README.md. UserError, and nothing written, where a file or a column is missing.
    """
    path = folder / 'README.md'
    page = filled(path.read_text(encoding='utf-8'), folder)
    with replacing(path) as file:
        file.write(page.encode())
    shown = names_shown(page)
    print(f'{path}: {len(shown)} tables')
    not_shown = sorted(names_of_files(folder) - shown)
    if not_shown:
        print(f'not shown: {", ".join(not_shown)}')


def filled(page, folder):
    """The text of a page with the table after each mark as the JSON file in the folder has it."""
    def table(match):
        mark, name, columns = match[1], match[2], match[3].split(', ')
        path = folder / f'{name}.json'
        rows = read_json(path, advice='measure it again, or restore it with git').get('rows')
        if not rows:
            raise UserError(f'{path}: no rows, so there is no table to write')
        missing = [column for column in columns if any(column not in row for row in rows)]
        if missing:
            raise UserError(f'{path}: no column {", ".join(missing)}: it has {", ".join(rows[0])}')
        return mark + markdown([{column: row[column] for column in columns} for row in rows])
    return MARK.sub(table, page)


def names_shown(page):
    """{'MACHINE/NAME'} of the tables of a page"""
    return {match[2] for match in MARK.finditer(page)}


def names_of_files(folder):
    """{'MACHINE/NAME'} of the JSON files in a folder, without those of --quick, which git ignores"""
    names = {f'{path.parent.name}/{path.stem}' for path in folder.glob('*/*.json')}
    return {name for name in names if not name.endswith('_quick')}


def markdown(rows):
    """Rows (dicts with the same keys) -> a Markdown table."""
    table = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    return ''.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |\n' for row in table)


def cell(value):
    if isinstance(value, float):
        return f'{value:.4g}'
    if isinstance(value, int):
        return f'{value:,}'
    return str(value)
