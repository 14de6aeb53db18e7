"""What the README shows is true."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import train

from runs import HAS_ADDED_BLOCKS

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


def test_every_option_that_the_readme_names_is_one():
    shown = subprocess.run([sys.executable, ROOT / 'train.py', '--help'], capture_output=True, text=True).stdout
    known = set(re.findall(r'^  --(\w+)', shown, re.M))
    named = set(re.findall(r'--(\w+)', re.search(r'## Options(.*?)\n## ', README, re.S).group(1)))
    assert len(named) > 20 and named - known <= {'help', 'key', 'out'}


def test_the_training_commands_of_the_pages_have_options_that_fit_together():
    pages = [README, *((ROOT / 'docs' / name).read_text() for name in ('data.md', 'export.md', 'pretrained.md'))]
    commands = re.findall(r'^(?:torchrun .*)?(?:python )?train\.py (.*)$', '\n'.join(pages), re.M)
    argvs = [shlex.split(command, comments=True) for command in commands]
    elsewhere = re.compile('recover.py|finetune|--init_from')  # need another command or a download first
    argvs = [argv for argv in argvs if not elsewhere.search(' '.join(argv))]
    for argv in argvs:
        train.load(argv)  # a UserError if options contradict each other
    assert len(argvs) > 8 and any('--packing=best_fit' in argv for argv in argvs)


@pytest.mark.skipif(HAS_ADDED_BLOCKS, reason='next to added blocks the diff of the README no longer fits')
def test_the_block_of_the_readme_is_added_by_its_diff_and_passes_the_tests(tmp_path):
    (tmp_path / 'tests').mkdir()
    for name in ('model.py', 'kernels.py', 'pytest.ini', 'tests/test_blocks.py', 'tests/conftest.py'):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / 'block.diff').write_text(re.search(r'```diff\n(.*?)```', README, re.S).group(1))
    applied = subprocess.run(['git', 'apply', 'block.diff'], cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, (
        'README.md, "Adding a block": its diff no longer fits model.py or tests/test_blocks.py. '
        f'Copy the lines that surround its additions from these files. {applied.stderr}')
    tests = 'reglu and (later_embedding or cached_decoding or every_parameter or starts_at)'
    done = subprocess.run([sys.executable, '-m', 'pytest', '-n0', '-p', 'no:cacheprovider', '-k', tests], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '7 passed' in done.stdout, done.stdout


def test_every_table_of_the_results_stands_behind_the_command_that_made_it():
    page = (ROOT / 'results' / 'README.md').read_text()
    parts = re.split(r'<!-- ([\w.-]+/\w+): .*? -->\n', page)
    commands = []
    for before, name in zip(parts[::2], parts[1::2]):
        commands += re.findall(r'`(python bench\.py [^`]+)`', before)
        assert json.loads((ROOT / 'results' / f'{name}.json').read_text())['command'] == commands[-1], name
    assert len(parts) > 30
