"""
Streams the rows of a dataset from the Hugging Face Hub, and continues after network errors. Imported by corpus.py:

    stream = Stream('fineweb_edu', 'HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', Reading())
    for row, dropped, position in stream.rows(position):    # position None: from the beginning
"""
import asyncio
import logging
import socket
import sys
import time

from configurator import UserError
from corpora.reading import check_names, installed

RETRIES = 5  # retries after a network error, with waits of 1, 2, 4, 8 and 16 s; each document received resets the count
HOPELESS = 15  # seconds without a first row after which we assume that there is no network and give up


class Stream:
    """Streams the rows of a dataset on the Hugging Face Hub."""

    def __init__(self, name, repository, subset, split, reading):
        self.name, self.where, self.reading = name, f'{repository} {subset} from the Hugging Face Hub', reading
        self.arguments = {'path': repository, 'name': subset, 'split': split}
        self.total = 0  # rows; 0 if the library does not know

    def place(self, position):
        return f'{self.where}: row {position[1]:,}'

    def rows(self, start=None):
        """
        Yields (row or None, dropped, position). After a network error it waits and continues after the last row. It
        raises a UserError for a permanent error, or when the retries are used up.

        A position is [state of datasets' IterableDataset, number of rows]. Resuming opens the right file at once, but
        skips over the earlier rows of that file.
        """
        position, failures, begin, arrived = (start or [None, 0])[:2], 0, time.monotonic(), False
        while True:
            try:
                rows = self.open()
                if position[0]:
                    rows.load_state_dict(position[0])
                for row in rows:
                    if not arrived:
                        for wanted in ((self.reading.field,), self.reading.scores):
                            check_names(f'{self.name}: {self.where}', row, wanted)
                    position, arrived, failures = [rows.state_dict(), position[1] + 1], True, 0
                    yield row, '' if isinstance(row[self.reading.field], str) else 'unreadable', position
                return
            except UserError:
                raise
            except Exception as error:  # any class: each underlying library has its own
                failures += 1
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300].rstrip(':')
                offline = 'HF_HUB_OFFLINE is set, ' if installed('datasets').config.HF_HUB_OFFLINE else ''
                hopeless = failures > RETRIES or not arrived and time.monotonic() - begin > HOPELESS
                if hopeless or offline or not is_transient(error):
                    times = f'{failures} time' if failures == 1 else f'{failures} times'
                    raise UserError(f'{self.name}: cannot read {self.where} after row {position[1]:,}, tried {times} '
                                    f'({offline}{reason}). Without a network, use --source=PATH for .parquet files '
                                    'that you have downloaded, --dataset=text:PATH or --dataset=pylib') from error
                print(f'{self.name}: {reason}: trying again in {2**(failures - 1)} s', file=sys.stderr, flush=True)
                time.sleep(2**(failures - 1))

    def open(self):
        datasets, hub = installed('datasets'), installed('huggingface_hub')
        datasets.disable_progress_bars()
        for library in (datasets, hub):
            library.utils.logging.set_verbosity(logging.CRITICAL)  # we print our own error lines
        # By default the library retries 20 times in silence.
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would contact another server and wait
        rows = datasets.load_dataset(**self.arguments, streaming=True)
        known = (rows.info.splits or {}).get(self.arguments['split']) if rows.info else None
        self.total = self.total or known and known.num_examples or 0
        return rows

    def progress(self, position):
        return min(1, (position[1] if position else 0) / self.total) if self.total else None


def is_transient(error):
    """
    Whether to retry after this error. Looks at the error and the chain of its causes. An HTTP status decides if there
    is one, otherwise the exception class.
    """
    chain = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        status = getattr(getattr(link, 'response', None), 'status_code', None) or getattr(link, 'status', None)
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
    classes = {parent for link in chain for parent in type(link).__mro__}
    packages = {'requests', 'urllib3', 'httpx', 'httpx2', 'httpcore', 'httpcore2', 'aiohttp', 'fsspec', 'http'}
    return bool(classes & {ConnectionError, TimeoutError, asyncio.TimeoutError, socket.gaierror} or
                packages & {cls.__module__.partition('.')[0] for cls in classes})
