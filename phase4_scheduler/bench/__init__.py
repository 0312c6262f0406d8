"""A load generator for any OpenAI-compatible server, and the same workloads offline.

Whoever compares servers calls `run_load`; the commands and the benchmarks do nothing else.

    result = await run_load(Target("http://127.0.0.1:8000"), mixed(64, PromptMaker(seed=0)), Arrival.closed_loop(8))
    print(summarise(result).output_rate, "tokens/s")

What is where, in the order in which it is read:

    workloads, workload_file      what is asked: prompts and how many tokens of each answer, from a seed or a file
    arrivals                      when: Poisson, constant, bursty, or so many at a time
    http_parser, http_client      HTTP/1.1 from the socket up, so that the client is never what is measured
    sse, chunks                   the stream of an answer, and when its tokens came
    client, load                  one request with its retries; all of them: `run_load`
    samples, summary              what is kept of each; percentiles, rates, goodput
    result_file, tables, plots    what is written and shown
    offline                       the same workloads through `LLM`, without a server
"""
