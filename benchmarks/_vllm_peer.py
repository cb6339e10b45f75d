"""vLLM on a CPU, asked over its standard input: run by the peer's own Python (`_vllm`), which has no Shoal.

Reads one JSON object a line, {"prompts": [[ids]], "tokens": n, "sampled": bool}, and answers each with the seconds of
the whole call, on the clock and of the processor. Its arguments: the checkpoint's folder, `eager` or `compiled`, and
the most sequences at once.
"""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the engine prints is no answer
    from vllm import LLM, SamplingParams

    folder, mode, sequences = sys.argv[1], sys.argv[2], int(sys.argv[3])
    engine = LLM(
        model=folder,
        dtype="bfloat16",
        enforce_eager=mode == "eager",
        max_model_len=1024,
        max_num_seqs=sequences,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(
            temperature=1.0 if asked["sampled"] else 0.0,
            max_tokens=asked["tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        started, processor = time.perf_counter(), time.process_time()
        done = engine.generate(prompts, params, use_tqdm=False)
        took = {"seconds": time.perf_counter() - started, "processor_s": time.process_time() - processor}
        assert all(len(one.outputs[0].token_ids) == asked["tokens"] for one in done)
        print(json.dumps(took), file=answers)


if __name__ == "__main__":
    main()
