"""``lvlm-decode serve``: one model with all methods behind the chat API that OpenAI's clients speak.

    pip install 'lvlm-decode[serve]'
    lvlm-decode serve --model tiny --method vcd --port 8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="tiny-llava:vcd", messages=[...], extra_body={"alpha": 1.0})

**What is served.** ``POST /v1/chat/completions`` with pictures, whole or streamed; ``GET /v1/models``; ``GET /health``;
``GET /metrics`` in Prometheus's text form. A request names its method behind a colon of the model (``tiny-llava:vcd``), or as
the field ``method``, sums and parameters included (``"vcd(alpha=0.5)+icd"``); otherwise it gets the first ``--method`` of the
server, plain decoding when there is none. A field that no chat request has is a parameter of the method (``alpha``). What a
method and the chat API both call ``temperature``, ``top_p``, ``top_k`` or ``model`` is the request's; the method's own is
written into its name: ``"deco(top_k=5)"``.

**Honoured or refused.** Every field of a request is honoured, or refused with status 400 in OpenAI's error shape, where
``param`` names the field. Honoured: ``model, messages, max_tokens, max_completion_tokens, temperature, top_p, top_k, stop, seed,
sample_id, stream, stream_options.include_usage, user, method``. Taken only where they ask for nothing: ``n`` (1),
``logprobs``, penalties, ``logit_bias``, tools, ``response_format`` and others; see :data:`.body.NEUTRAL`. A ``temperature`` that
is left out is 1, as OpenAI says, and 0 for a method that decodes greedily only.

**Seeds.** ``seed`` keys the views and the draws of a request by (seed, sample id, position). The sample id is a hash of
prompt and picture, or ``sample_id`` where the request gives one. So a seed gives the same answer alone, in a batch and on
another server. Without a seed the views are those of seed 0 and the draws are new each time.

**Pictures** come as ``data:`` addresses. Addresses on the network are fetched with ``--fetch-images`` only, within 10 seconds and
20 megabytes, never from addresses that are not public unless ``--private-addresses`` is given; files with ``--image-folder``
only, from below that folder.

**Batches.** One queue; the oldest request decides which batch comes next, and takes with it those that are waiting with
the same method, decoding, seed and kind of prompt, up to ``--batch-size``. A batch is decoded to its end before the next one,
so a short answer is sent at once and its row idles. Requests whose seeds differ share no batch. A client that hangs up
leaves the queue at once; in a batch its row ends at the next token. A batch that fails is asked again one request at a
time, so that an error of one costs the others time only. On vLLM (``--engine vllm``) requests join and leave at every token.

**Limits.** Beyond ``--queue`` waiting requests the answer is 429; while the server ends it is 503; after ``--timeout`` seconds
504. The server listens on 127.0.0.1 unless ``--host`` says otherwise, which needs a key (``--api-key`` or the variable
LVLM_DECODE_API_KEY). It has no encryption: put a proxy in front. A client cannot name files, regular expressions or
amounts of work beyond :data:`.menu.MOST` in a method's parameters; the operator's ``--method`` can.
"""
