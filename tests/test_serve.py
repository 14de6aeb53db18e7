"""sample.py --serve answers a real client, on this machine only, and a bad request harms nothing."""
import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import UserError
from corpora.vocabulary import train_bpe
from model import GPT, GPTConfig
from runtime import generation, serve
from sample import SampleConfig
from tokenizer import load_tokenizer


@pytest.fixture(scope='module')
def served():
    """A server on a free port, with a model of bytes whose weights are random."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=260, n_layer=1, n_head=2, n_embd=16)).eval()
    encoding = load_tokenizer(train_bpe(['abc def'], 257))
    config = SampleConfig(run='runs/x', port=0, max_new_tokens=12, stop=False)
    with serve.make_server(config, model, encoding, torch.device('cpu'), torch.float32) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path='/v1/completions', body=None, **headers):
    """(status, content, headers) of a request by urllib."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f'http://127.0.0.1:{server.server_port}{path}', data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def expected(server, prompt, n, seed, temperature=0.8):
    idx = torch.tensor([generation.encode(server.encoding, prompt)])
    tokens = generation.generate(server.model, idx, server.encoding.n_vocab, n, temperature, seed=seed,
                                 eot_id=server.encoding.eot_token)
    return ''.join(generation.pieces(server.encoding, [token.item() for token in tokens]))


def test_a_completion_equals_sample_py_with_the_same_seed(served):
    status, content, headers = ask(served, body={'prompt': 'abc', 'max_tokens': 20, 'seed': 3, 'n': 2, 'model': 'any'})
    answer = json.loads(content)
    assert status == 200 and headers['Content-Type'] == 'application/json' and answer['object'] == 'text_completion'
    seeds = (3, generation.sample_seed(3, 1))
    assert [choice['text'] for choice in answer['choices']] == [expected(served, 'abc', 20, seed) for seed in seeds]
    assert [choice['finish_reason'] for choice in answer['choices']] == ['length', 'length']
    assert answer['usage'] == {'prompt_tokens': 4, 'completion_tokens': 40, 'total_tokens': 44}
    defaults = json.loads(ask(served, body={})[1])['choices'][0]['text']  # the command line's
    assert defaults == expected(served, '', 12, SampleConfig.seed)


def test_a_stream_has_the_same_text_piece_by_piece(served):
    status, content, headers = ask(served, body={'prompt': 'é', 'max_tokens': 25, 'temperature': 0, 'stream': True})
    events = content.decode().split('\n\n')
    assert status == 200 and headers['Content-Type'].startswith('text/event-stream') and events[-2:] == ['data: [DONE]', '']
    choices = [json.loads(event.removeprefix('data: '))['choices'][0] for event in events[:-2]]
    assert ''.join(choice['text'] for choice in choices) == expected(served, 'é', 25, 0, temperature=0)
    assert [choice['finish_reason'] for choice in choices] == [None] * (len(choices) - 1) + ['length'] and len(choices) > 5


def test_a_text_ends_before_a_stop_string_and_at_the_end_of_a_document(served, monkeypatch):
    whole = expected(served, '', 12, 5)
    stop = whole[4:7]
    answer = json.loads(ask(served, body={'seed': 5, 'stop': stop})[1])['choices'][0]
    assert answer['text'] == whole[:whole.index(stop)] and answer['finish_reason'] == 'stop'
    monkeypatch.setattr(served.config, 'stop', True)
    script = iter([ord('y'), served.encoding.eot_token])  # a byte is its own id
    monkeypatch.setattr(generation, 'choose', lambda logits, *_: torch.tensor([next(script)]))
    answer = json.loads(ask(served, body={})[1])['choices'][0]
    assert answer['text'] == 'y' and answer['finish_reason'] == 'stop'


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(st.text('ab', max_size=4), max_size=8), st.lists(st.text('ab', min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_across_pieces(texts, stops):
    whole, parts = ''.join(texts), list(serve.until_stop(texts, stops))
    ends = [len(whole[:i]) for i in range(len(whole) + 1) if any(whole[:i].endswith(stop) for stop in stops)]
    found = ''.join(text for text, _ in parts)
    assert parts[-1][1] == bool(ends) and not any(stop in found for stop in stops)
    assert whole.startswith(found) and (ends or found == whole)


@pytest.mark.parametrize('body, message', [
    (b'{', 'not JSON'), (b'[1]', 'must be a JSON object'), ({'promt': 'a'}, "unknown field 'promt'"),
    ({'prompt': 3}, 'prompt must be one text'), ({'n': 'a'}, 'n must be a whole number'),
    ({'prompt': ['a', 'b']}, 'one text'), ({'max_tokens': 10**6}, 'max_tokens=1000000 must lie in 1 to 4096'),
    ({'max_tokens': 0}, 'max_tokens=0'), ({'n': 99}, 'n=99 must lie in 1 to 8'), ({'top_p': 0}, 'top_p=0.0 must lie'),
    ({'temperature': -1}, 'temperature=-1'), ({'stop': ['']}, 'stop must be'), ({'stop': 'x' * 500}, 'stop must be'),
    ({'logprobs': 5}, 'logprobs is not supported'), ({'prompt': '\ud800'}, 'not valid Unicode'), ({'seed': 2**70}, 'must lie in'),
], ids=str)
def test_a_bad_request_gets_status_400_and_the_reason(served, body, message):
    status, content, _ = ask(served, body=body)
    assert status == 400 and message in json.loads(content)['error']['message']


def test_the_page_and_the_list_of_models(served):
    status, content, headers = ask(served, '/')
    assert status == 200 and headers['Content-Type'].startswith('text/html') and b'/v1/completions' in content
    assert b'http://' not in content and b'src=' not in content, 'the page loads nothing from elsewhere'
    assert json.loads(ask(served, '/v1/models')[1])['data'][0]['id'] == 'runs/x'
    assert ask(served, '/etc/passwd')[0] == ask(served, '/v1/chat', body={})[0] == 404


def test_only_requests_from_this_machine_are_answered(served):
    assert served.server_address[0] == '127.0.0.1'
    for headers in ({'Host': 'evil.example:80'}, {'Origin': 'http://evil.example'}, {'Origin': 'null'}):
        assert ask(served, body={}, **headers)[0] == 403 and ask(served, '/', **headers)[0] == 403
    assert ask(served, body={'max_tokens': 1}, Origin=f'http://localhost:{served.server_port}')[0] == 200


def test_a_body_that_is_too_long_is_not_read(served):
    connection = http.client.HTTPConnection('127.0.0.1', served.server_port, timeout=30)
    connection.putrequest('POST', '/v1/completions')
    connection.putheader('Content-Length', str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@contextmanager
def slow_steps(monkeypatch):
    """Every token waits until the block sets `go`."""
    go, choose = threading.Event(), generation.choose
    monkeypatch.setattr(generation, 'choose', lambda *arguments: go.wait(30) and choose(*arguments))
    try:
        yield go
    finally:
        go.set()


def test_more_requests_than_the_queue_holds_are_refused_and_the_others_answered(served, monkeypatch):
    monkeypatch.setattr(served, 'places', threading.BoundedSemaphore(2))
    statuses = []
    with slow_steps(monkeypatch) as go:
        threads = [threading.Thread(target=lambda: statuses.append(ask(served, body={})[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        while served.places._value:  # until both are inside
            threading.Event().wait(0.005)
        status, content, _ = ask(served, body={})
        assert status == 503 and '2 requests' not in content.decode() and 'try again later' in content.decode()
        go.set()
        for thread in threads:
            thread.join(30)
    assert statuses == [200, 200]


def test_a_disconnected_client_ends_its_text_and_the_next_client_is_answered(served, monkeypatch):
    made = []
    choose = generation.choose
    monkeypatch.setattr(generation, 'choose', lambda *arguments: made.append(1) or choose(*arguments))
    client = socket.create_connection(('127.0.0.1', served.server_port))
    body = json.dumps({'max_tokens': 4096, 'stream': True}).encode()
    client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: %d\r\n\r\n%s'
                   % (served.server_port, len(body), body))
    client.recv(100)
    client.close()
    assert ask(served, body={'max_tokens': 1})[0] == 200  # waits for the first to end
    assert len(made) < 4000


def test_logits_that_are_not_finite_are_status_500_with_the_reason(served, monkeypatch):
    def broken(*_):
        raise UserError('no token can be drawn: the logits of the model are not finite')
    monkeypatch.setattr(generation, 'choose', broken)
    status, content, _ = ask(served, body={})
    assert status == 500 and 'not finite' in json.loads(content)['error']['message']


def test_a_port_that_is_taken_is_one_line(served):
    config = SampleConfig(run='x', port=served.server_port)
    with pytest.raises(UserError, match=f'--port={served.server_port}: cannot listen there .*: choose another --port'):
        serve.make_server(config, None, None, None, None)
