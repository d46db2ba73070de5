"""CTranslate2's Generator; the variant is its compute type (float32, int8). Its tokens are strings: `t17`."""

import ctranslate2

from workers.protocol import Loaded, Tokens, loaded, serve, timed_whole


def load(model: str, variant: str, n_threads: int) -> Loaded:
    generator = ctranslate2.Generator(
        model,
        device="cpu",
        compute_type=variant,
        inter_threads=1,
        intra_threads=n_threads,
    )
    # Asked for int8 it says int8_float32: what is not quantised is float32.
    if generator.compute_type.split("_")[0] != variant:
        raise ValueError(f"CTranslate2 runs {generator.compute_type} where {variant} was asked for")

    def generate(prompts: Tokens, n_new: int) -> Tokens:
        results = generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            min_length=n_new,
            max_length=n_new,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return loaded(timed_whole(generate), model, 4)


if __name__ == "__main__":
    serve(load)
