"""What the README shows is true."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_ci_calls_the_test_command_of_the_readme():
    command = re.search(r'\*\*Test\*\* everything:\n\n```sh\n(.*?)\n```', README).group(1)
    assert command == 'pip install -r requirements.txt -r requirements-dev.txt && python -m pytest'
    assert f'\n{command}\n' in (ROOT / '.ci' / 'run').read_text()


def test_every_file_in_the_table_exists_and_every_script_is_in_the_table():
    table = set(re.findall(r'^\| `([\w/.]+)` \|', README, re.M))
    assert all((ROOT / name).exists() for name in table)
    assert {path.name for path in ROOT.glob('*.py')} <= table


def test_every_knob_that_the_readme_names_is_one():
    shown = subprocess.run([sys.executable, ROOT / 'train.py', '--help'], capture_output=True, text=True).stdout
    known = set(re.findall(r'^  --(\w+)', shown, re.M))
    named = set(re.findall(r'--(\w+)', re.search(r'## The knobs that matter(.*?)\n## ', README, re.S).group(1)))
    assert len(named) > 20 and named - known <= {'help', 'out'}


def test_the_block_of_the_readme_is_added_by_its_diff_and_passes_the_tests(tmp_path):
    (tmp_path / 'tests').mkdir()
    for name in ('model.py', 'kernels.py', 'pytest.ini', 'tests/test_blocks.py', 'tests/conftest.py'):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / 'block.diff').write_text(re.search(r'```diff\n(.*?)```', README, re.S).group(1))
    subprocess.run(['git', 'apply', 'block.diff'], cwd=tmp_path, check=True)
    tests = 'reglu and (later_embedding or cached_decoding or every_parameter or starts_at)'
    done = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-k', tests], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '7 passed' in done.stdout, done.stdout


TABLES = {  # command: the names of its results, in the order in which the README shows them
    'quality --preset=tiny --tokens=1250000': ['quality_tiny'],
    'peers --nanogpt=PATH': ['peers', 'peers_race'], 'quality --preset=speedrun': ['quality_speedrun'],
    'peers --llama_cpp': ['peers_llama_cpp'], 'convert': ['convert'],
    'blocks': ['blocks'], 'context': ['context'], 'scaling': ['scaling'], 'loop': ['loop'],
    'plan': ['plan'], 'data': ['data', 'data_memory', 'data_shards'], 'quality --preset=tiles --seeds=1': ['quality_tiles'],
    'quality --preset=routing --seeds=1': ['quality_routing'], 'quality --preset=bitnet': ['quality_bitnet']}


def section_of(command):
    return re.search(rf'`python bench.py {command}`.*?(?=\n`python bench.py|\n## )', README, re.S).group(0)


def tables_of(command):
    return [table.splitlines() for table in re.findall(r'\n\n(\|.*?)(?=\n\n)', section_of(command) + '\n', re.S)]


def test_every_table_of_numbers_comes_from_a_command():
    numbers = re.search(r'\n## Numbers\n(.*?)\n## ', README, re.S).group(1)
    assert len(re.findall(r'\n\n\|', numbers)) == sum(map(len, TABLES.values()))
    assert all(len(tables_of(command)) == len(names) for command, names in TABLES.items())


@pytest.mark.parametrize('command, name', [(command, name) for command, names in TABLES.items() for name in names])
def test_every_number_of_the_tables_is_in_the_results(command, name):
    machine = 'amd-epyc-2-threads' if 'EPYC' in section_of(command) else 'intel-xeon-2.50ghz-2-threads'  # as the README says
    results = json.loads((ROOT / 'results' / machine / f'{name}.json').read_text())
    assert results['command'] == f'python bench.py {command}'
    table = tables_of(command)[TABLES[command].index(name)]
    keys = [cell.strip() for cell in table[0].strip('|').split('|')]
    assert len(table) == len(results['rows']) + 2
    for line, row in zip(table[2:], results['rows']):
        cells = dict(zip(keys, (cell.strip() for cell in line.strip('|').split('|'))))
        for key, cell in cells.items():
            value = row[key]
            assert cell == (value if isinstance(value, str) else f'{value:,}' if isinstance(value, int) else f'{value:.4g}'), key
