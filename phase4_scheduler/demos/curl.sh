#!/usr/bin/env bash
# Every kind of request with curl alone:   bash phase4_scheduler/demos/curl.sh [http://127.0.0.1:8000]
# A server with a key: set TITAN_API_KEY.
set -euo pipefail

url=${1:-http://127.0.0.1:8000}
key=${TITAN_API_KEY:-none}

ask() { # path, then more arguments of curl; an answer that is no success ends the script and is shown
    local path=$1
    shift
    curl --silent --show-error --fail-with-body "$url$path" \
        --header "Authorization: Bearer $key" --header "Content-Type: application/json" "$@"
}

title() { printf '\n\n== %s\n' "$1"; }

title "models"
ask /v1/models
model=${MODEL:-$(ask /v1/models | grep --only-matching '"id":"[^"]*"' | head -n 1 | cut -d '"' -f 4)}

title "a completion"
ask /v1/completions --data '{"model": "'"$model"'", "prompt": "def add(a, b):", "max_tokens": 16, "temperature": 0}'

title "the same, streamed: a line for each piece, then what was used, then [DONE]"
ask /v1/completions --no-buffer --data '{
    "model": "'"$model"'", "prompt": "def add(a, b):", "max_tokens": 16, "temperature": 0,
    "stream": true, "stream_options": {"include_usage": true}
}'

title "two completions with log-probabilities and a seed"
ask /v1/completions --data '{
    "model": "'"$model"'", "prompt": "class Stack:", "max_tokens": 4, "n": 2, "seed": 7, "temperature": 0.8, "logprobs": 2
}'

title "a chat, streamed"
ask /v1/chat/completions --no-buffer --data '{
    "model": "'"$model"'", "messages": [{"role": "user", "content": "def add(a, b):"}],
    "max_tokens": 16, "temperature": 0, "stream": true
}'

title "Anthropic's messages"
ask /v1/messages --header "x-api-key: $key" --header "anthropic-version: 2023-06-01" --data '{
    "model": "'"$model"'", "messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 16, "temperature": 0
}'

title "tokens of a text"
ask /tokenize --data '{"model": "'"$model"'", "prompt": "def add(a, b):"}'

title "a mistake: what, and which value (status 400)"
ask /v1/completions --data '{"model": "'"$model"'", "prompt": "x", "temperature": 9}' || true

title "is it alive, is it ready, how is it doing"
ask /health --output /dev/null --write-out 'health %{http_code}\n'
ask /ready --output /dev/null --write-out 'ready %{http_code}\n'
ask /load

title "metrics for Prometheus"
ask /metrics | grep --extended-regexp '^vllm:(generation_tokens|request_success|num_requests_running)' || true
