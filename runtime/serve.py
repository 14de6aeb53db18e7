"""Serve a model on this machine: a web page, and /v1/completions in the format of OpenAI's API, with streaming.

    python sample.py runs/x --serve --port=8000          # then open http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def", "max_tokens": 50, "stream": true}'

The server listens on 127.0.0.1 only, so other machines cannot reach it. It refuses web pages from elsewhere (another
Host or Origin). It generates one text at a time. Up to QUEUE requests run or wait; more get status 503.
The sampling options of the command line are the defaults of a request.
"""
import json
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from configurator import UserError, typed
from kernels import autocast
from runtime.generation import encode, generate, pieces, sample_seed

QUEUE = 8  # requests that run or wait at the same time
MAX_BODY = 1_000_000  # bytes of a request
MAX_TOKENS = 4096  # new tokens per text
MAX_TEXTS = 8  # texts per request
MAX_STOPS, MAX_STOP = 4, 200  # strings that end a text, and characters of each
KINDS = {str: 'one text', int: 'a whole number', float: 'a number', bool: 'true or false'}
SECONDS = 30  # a client that neither sends nor reads for so long is dropped
# Fields that do not change the text, and fields that are refused unless they have their neutral value.
IGNORED = {'model', 'user', 'stream_options'}
NEUTRAL = {'echo': (False,), 'best_of': (1,), 'logprobs': (False,), 'suffix': ('',), 'logit_bias': ({},),
           'presence_penalty': (0,), 'frequency_penalty': (0,)}


class BadRequest(Exception):
    pass


def run(config, model, encoding, device, dtype, decoder):
    """Serve until Ctrl-C. config: a SampleConfig. UserError if the port is taken."""
    with make_server(config, model, encoding, device, dtype, decoder) as server:
        print(f'serving on http://127.0.0.1:{server.server_port} (only this machine; Ctrl-C ends it)', file=sys.stderr,
              flush=True)
        server.serve_forever()


def make_server(config, model, encoding, device, dtype, decoder=None):
    try:
        server = ThreadingHTTPServer(('127.0.0.1', config.port), Handler)
    except OSError as error:
        raise UserError(f'--port={config.port}: cannot listen there ({error.strerror}): choose another --port')
    server.daemon_threads = True
    server.config, server.model, server.encoding, server.device, server.dtype = config, model, encoding, device, dtype
    server.decoder = decoder
    server.places, server.turn = threading.BoundedSemaphore(QUEUE), threading.Lock()
    return server


# ----------------------------------------------------------------------------------------------------------------------
# Requests

def read_request(body, config, encoding):
    """The options of a completion: the bytes of a JSON object -> dict. Missing fields come from the SampleConfig.

    BadRequest, with a message for the client, for anything that is not understood."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f'the body is not JSON: {error}')
    if not isinstance(fields, dict):
        raise BadRequest('the body must be a JSON object')
    fields = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
    for key, neutral in NEUTRAL.items():
        if key in fields and fields.pop(key) not in neutral:
            raise BadRequest(f'{key} is not supported')
    request = {'prompt': '', 'max_tokens': min(config.max_new_tokens, MAX_TOKENS), 'temperature': config.temperature,
               'top_p': config.top_p, 'top_k': config.top_k, 'seed': config.seed, 'n': 1, 'stop': [], 'stream': False}
    if unknown := fields.keys() - request.keys():
        raise BadRequest(f'unknown field {sorted(unknown)[0]!r}; known are {", ".join(request)}')
    request |= fields
    for key in ('prompt', 'stop'):
        if key == 'stop' and isinstance(request[key], str):
            request[key] = [request[key]]
        elif key == 'prompt' and isinstance(request[key], list) and len(request[key]) == 1:
            request[key] = request[key][0]  # clients may send one prompt as a list
    kinds = {'prompt': str, 'max_tokens': int, 'temperature': float, 'top_p': float, 'top_k': int, 'seed': int,
             'n': int, 'stream': bool}
    for key, kind in kinds.items():
        try:
            request[key] = typed(request[key], kind)
        except (ValueError, OverflowError):
            raise BadRequest(f'{key} must be {KINDS[kind]}')
    stops = request['stop']
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
            isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops):
        raise BadRequest(f'stop must be a string or at most {MAX_STOPS} strings of 1 to {MAX_STOP} characters')
    for key, low, high in (('max_tokens', 1, MAX_TOKENS), ('n', 1, MAX_TEXTS), ('temperature', 0, 100),
                           ('top_k', 0, 2**31), ('seed', -2**63, 2**63 - 1)):
        if not low <= request[key] <= high:
            raise BadRequest(f'{key}={request[key]} must lie in {low} to {high}')
    if not 0 < request['top_p'] <= 1:
        raise BadRequest(f'top_p={request["top_p"]} must lie in (0, 1]')
    try:
        request['prompt'].encode()
    except UnicodeError:  # half of a pair, which JSON can express
        raise BadRequest('prompt has characters that are not valid Unicode')
    request['ids'] = encode(encoding, request['prompt'])
    return request


def until_stop(texts, stops):
    """Pieces of text up to the first of the strings `stops`. Yields (piece, True) last if one was found.

    Text that may be the start of a stop string is held back until that is known."""
    held, longest = '', max(map(len, stops), default=1)
    for text in texts:
        held += text
        ends = [held.find(stop) for stop in stops if stop in held]
        if ends:
            yield held[:min(ends)], True
            return
        keep = next((n for n in range(min(longest - 1, len(held)), 0, -1)
                     if any(stop.startswith(held[-n:]) for stop in stops)), 0)
        ready, held = held[:len(held) - keep], held[len(held) - keep:]
        yield ready, False
    yield held, False


# ----------------------------------------------------------------------------------------------------------------------
# Answers

class Handler(BaseHTTPRequestHandler):
    timeout = SECONDS
    server_version, sys_version = 'nanotrix', ''

    def do_GET(self):
        if not self.is_local():
            self.fail(403, 'this server answers only pages and programs of this machine')
        elif self.path == '/':
            self.reply(200, PAGE.encode(), 'text/html; charset=utf-8')
        elif self.path == '/v1/models':
            model = {'id': self.server.config.run, 'object': 'model', 'created': 0, 'owned_by': 'local'}
            self.reply(200, json.dumps({'object': 'list', 'data': [model]}).encode())
        else:
            self.fail(404, f'{self.path[:100]}: unknown; there are /, /v1/models and /v1/completions')

    def do_POST(self):
        if not self.is_local():
            return self.fail(403, 'this server answers only pages and programs of this machine')
        if self.path != '/v1/completions':
            return self.fail(404, f'{self.path[:100]}: unknown; there are /, /v1/models and /v1/completions')
        size = self.headers.get('Content-Length', '')
        if not size.isdecimal():
            return self.fail(411, 'a Content-Length header is needed')
        if int(size) > MAX_BODY:
            return self.fail(413, f'the body has {int(size):,} bytes, the limit is {MAX_BODY:,}')
        try:
            request = read_request(self.rfile.read(int(size)), self.server.config, self.server.encoding)
        except BadRequest as error:
            return self.fail(400, str(error))
        if not self.server.places.acquire(blocking=False):
            return self.fail(503, f'{QUEUE} requests are running or waiting: try again later')
        try:
            with self.server.turn:
                (self.stream if request['stream'] else self.answer)(request)
        except UserError as error:
            self.fail(500, str(error))
        except OSError:  # the client went away, or reads too slowly
            self.close_connection = True
        finally:
            self.server.places.release()

    def is_local(self):
        """Whether Host and Origin are this server. Protects against web pages that let a browser call it."""
        own = {f'{host}:{self.server.server_port}' for host in ('127.0.0.1', 'localhost')}
        origin = self.headers.get('Origin')
        return self.headers.get('Host') in own and (origin is None or origin.removeprefix('http://') in own)

    def texts(self, request, i):
        """Yield (piece of text, reason to stop or None) of text number i of a request. Counts tokens in request."""
        server = self.server
        request['new_tokens'] = request.get('new_tokens', 0)
        count, ended = 0, False

        def tokens():
            nonlocal count, ended
            idx = torch.tensor([request['ids']], device=server.device)
            with autocast(server.device, server.dtype):
                for token in generate(server.model, idx, server.encoding.n_vocab, request['max_tokens'],
                                      request['temperature'], request['top_k'], request['top_p'],
                                      sample_seed(request['seed'], i), server.encoding.eot_token, server.decoder):
                    count += 1
                    if server.config.stop and token.item() == server.encoding.eot_token:
                        ended = True
                        return
                    yield token.item()
        for text, stopped in until_stop(pieces(server.encoding, tokens()), request['stop']):
            yield text, 'stop' if stopped else None
        request['new_tokens'] += count
        if not stopped:
            yield '', 'stop' if ended else 'length'

    def answer(self, request):
        """All texts at once."""
        choices = []
        for i in range(request['n']):
            parts = list(self.texts(request, i))
            choices.append(choice(i, ''.join(text for text, _ in parts), parts[-1][1]))
        usage = {'prompt_tokens': len(request['ids']), 'completion_tokens': request['new_tokens'],
                 'total_tokens': len(request['ids']) + request['new_tokens']}
        self.reply(200, json.dumps({**self.head(), 'choices': choices, 'usage': usage}).encode())

    def stream(self, request):
        """Server-sent events: one for each piece of text, [DONE] at the end. The connection closes after them."""
        head = self.head()
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream; charset=utf-8')
        self.send_header('Cache-Control', 'no-store')
        self.end_headers()
        try:
            for i in range(request['n']):
                for text, reason in self.texts(request, i):
                    if text or reason:
                        self.send_event({**head, 'choices': [choice(i, text, reason)]})
        except UserError as error:  # too late for a status
            self.send_event({'error': {'message': str(error), 'type': 'server_error'}})
        self.wfile.write(b'data: [DONE]\n\n')

    def send_event(self, content):
        self.wfile.write(f'data: {json.dumps(content)}\n\n'.encode())
        self.wfile.flush()

    def head(self):
        return {'id': f'cmpl-{uuid.uuid4().hex}', 'object': 'text_completion', 'created': int(time.time()),
                'model': self.server.config.run}

    def reply(self, status, content, kind='application/json'):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(content)))
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, message):
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        self.reply(status, json.dumps({'error': {'message': message, 'type': kind}}).encode())

    def log_message(self, form, *values):
        pass  # requests are not printed


def choice(i, text, reason):
    return {'index': i, 'text': text, 'logprobs': None, 'finish_reason': reason}


PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanoTriX</title>
<style>
:root { color-scheme: light dark } input { width: 5rem } label { margin-right: 1rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
textarea { width: 100%; height: 60vh; box-sizing: border-box; font: 14px/1.5 ui-monospace, monospace }
</style></head><body>
<p><label>new tokens <input id="max_tokens" type="number" value="200" min="1" max="4096"></label>
<label>temperature <input id="temperature" type="number" value="0.8" min="0" step="0.1"></label>
<label>seed <input id="seed" type="number" value="1"></label>
<button id="go">Continue the text</button> <button id="stop" disabled>Stop</button>
<span id="status" role="status"></span></p>
<textarea id="text" aria-label="text" autofocus></textarea>
<script>
const get = id => document.getElementById(id)
let controller = null
get('stop').onclick = () => controller.abort()
get('go').onclick = async () => {
  const request = { prompt: get('text').value, stream: true }
  for (const id of ['max_tokens', 'temperature', 'seed']) request[id] = Number(get(id).value)
  controller = new AbortController()
  get('go').disabled = true
  get('stop').disabled = false
  get('status').textContent = ''
  try {
    const body = JSON.stringify(request)
    const response = await fetch('/v1/completions', { method: 'POST', body, signal: controller.signal })
    if (!response.ok) throw new Error((await response.json()).error.message)
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    let buffer = ''
    for (let part; !(part = await reader.read()).done;) {
      const events = (buffer + part.value).split('\\n\\n')
      buffer = events.pop()
      for (const event of events) {
        if (event === 'data: [DONE]') continue
        const content = JSON.parse(event.slice(6))
        if (content.error) throw new Error(content.error.message)
        get('text').value += content.choices[0].text
        get('text').scrollTop = get('text').scrollHeight
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') get('status').textContent = error.message
  }
  get('go').disabled = false
  get('stop').disabled = true
}
</script></body></html>
'''
