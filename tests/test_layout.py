"""The layout of the repository: files, imports, and the length of functions and lines."""
import ast
import re
from pathlib import Path

import pytest

from runs import HAS_ADDED_BLOCKS

ROOT = Path(__file__).parent.parent
FOLDERS = ('runtime', 'corpora', 'deploy', 'benchmarks')
SCRIPTS = {'train', 'prepare', 'sample', 'evaluate', 'export', 'watch', 'bench'}
# From what is imported by all to what imports all. A file imports from its own floor and those below.
FLOORS = [{'configurator', 'files', 'kernels', 'triton_kernels'}, {'model', 'optim', 'schedule', 'tokenizer', 'verification'},
          {'settings', 'data', 'checkpoint', 'training'}, set(FOLDERS), SCRIPTS]
FILES = [path.relative_to(ROOT) for folder in ('.', *FOLDERS) for path in sorted((ROOT / folder).glob('*.py'))]


def floor(module):
    """The number of the floor of a module of ours, None for one of a library."""
    return next((number for number, names in enumerate(FLOORS) if module.split('.')[0] in names), None)


def imports(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize('path', FILES, ids=str)
def test_imports_point_one_way(path):
    own = floor(path.parts[0].removesuffix('.py'))
    assert own is not None, f'{path}: on no floor'
    above = [module for module in imports(path) if (floor(module) or 0) > own]
    assert not above, f'{path} imports {above}'
    assert own == len(FLOORS) - 1 or not SCRIPTS & set(imports(path)), 'a helper imports a script'


def imported_at_start(name, found):
    """The files of ours that `import name` loads, added to the set `found`."""
    path = ROOT / f'{name.replace(".", "/")}.py'
    path = path if path.is_file() else path.with_suffix('') / '__init__.py'
    if not path.is_file() or path in found:
        return
    found.add(path)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        else:
            continue
        for module in modules:
            imported_at_start(module.split('.')[0], found)
            imported_at_start(module, found)


def test_a_plain_run_on_prepared_data_imports_what_it_needs_and_no_more():
    found = set()
    imported_at_start('train', found)
    names = {str(path.relative_to(ROOT)) for path in found}
    assert {'model.py', 'runtime/disk.py', 'corpora/opening.py'} <= names
    assert not names & {'runtime/plan.py', 'runtime/group.py', 'deploy/pretrained.py', 'corpora/shards.py'}
    assert sum(len(path.read_text().splitlines()) for path in found) <= 7050


def test_a_script_imports_no_script():
    found = {name: SCRIPTS & set(imports(f'{name}.py')) for name in SCRIPTS}
    assert not any(found.values()), found


def test_at_most_20_files_are_at_the_root_and_the_readme_names_each():
    names = {path.name for path in ROOT.glob('*.py')}
    listed = set(re.findall(r'^\| `(\w+\.py)` \|', (ROOT / 'README.md').read_text(), re.M))
    assert len(names) <= 20 and names == listed


@pytest.mark.skipif(HAS_ADDED_BLOCKS, reason='added blocks make model.py longer')
def test_the_model_is_a_file_that_can_be_read_in_one_sitting():
    assert len((ROOT / 'model.py').read_text().splitlines()) <= 780


def test_no_function_is_longer_than_100_lines():
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 100, f'{path}: {node.name}'


def test_the_readme_is_short_and_shows_a_picture_first():
    text = (ROOT / 'README.md').read_text()
    assert len(text.encode()) <= 12_000 and '![' in '\n'.join(text.splitlines()[:40])
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert len(links) >= 4 and all((ROOT / link).exists() for link in links)


def test_no_line_of_code_is_longer_than_120_characters():
    for path in [*FILES, *(path.relative_to(ROOT) for path in (ROOT / 'config').rglob('*.py'))]:
        long = [number for number, line in enumerate((ROOT / path).read_text().splitlines(), 1) if len(line) > 120]
        assert not long, f'{path}: lines {long}'
