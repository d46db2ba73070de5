"""The peers: what a user would pick instead of gpt2rs, how each is installed, and in which widths it runs."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """One library.

    `name` is also the name of its module in workers/ and, where it has its own format, in convert/.
    `variants` says which of its forms run at a width; a width that is not there is one it does not have.
    `multiplies` says what a form's products multiply where that is not float32: which arithmetic peak a
    prefill is held against. `packs`: the forms that gpt2rs itself writes once, to be mapped.
    """

    name: str
    title: str
    distribution: str
    variants: dict[str, tuple[str, ...]]
    requirements: tuple[str, ...] = ()
    conversion_requirements: tuple[str, ...] = ()
    build_from_source: bool = False
    build_variables: dict[str, str] = field(default_factory=dict)
    converts: bool = True
    packs: tuple[str, ...] = ()
    multiplies: dict[str, str] = field(default_factory=dict)


DTYPES = ("float32", "bfloat16", "int8", "int4")

GPT2RS = Peer(
    name="gpt2rs",
    title="gpt2rs",
    distribution="gpt2rs",
    variants={
        "float32": ("float32",),
        "bfloat16": ("bfloat16", "bfloat16-fast"),
        "int8": ("int8",),
        "int4": ("int4",),
    },
    converts=False,
    packs=("int8", "int4"),
    multiplies={"bfloat16-fast": "bfloat16", "int8": "int8", "int4": "int8"},
)

PEERS = {
    peer.name: peer
    for peer in (
        GPT2RS,
        Peer(
            name="llama_cpp",
            title="llama.cpp",
            distribution="llama-cpp-python",
            # float16 is no width of gpt2rs; it stands beside bfloat16 as the other 16-bit form.
            variants={"float32": ("F32",), "bfloat16": ("BF16", "F16"), "int8": ("Q8_0",), "int4": ("Q4_0",)},
            requirements=("llama-cpp-python",),
            conversion_requirements=("gguf",),
            # A wheel would be built for an older CPU than this one.
            build_from_source=True,
            build_variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
            multiplies={"BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int8"},
        ),
        Peer(
            name="ctranslate2",
            title="CTranslate2",
            distribution="ctranslate2",
            variants={"float32": ("float32",), "int8": ("int8",)},
            requirements=("ctranslate2",),
            multiplies={"int8": "int8"},
        ),
        Peer(
            name="onnxruntime",
            title="onnxruntime",
            distribution="onnxruntime",
            variants={
                "float32": ("float32",),
                "int8": ("int8-blocks", "int8-dynamic"),
                "int4": ("int4-blocks",),
            },
            requirements=("onnxruntime",),
            conversion_requirements=("onnx", "onnx-ir"),
            multiplies={"int8-blocks": "int8", "int8-dynamic": "int8", "int4-blocks": "int8"},
        ),
        Peer(
            name="openvino",
            title="OpenVINO",
            distribution="openvino",
            variants={dtype: (dtype,) for dtype in DTYPES},
            requirements=("openvino",),
            conversion_requirements=("nncf",),
            multiplies={"bfloat16": "bfloat16", "int8": "int8", "int4": "int8"},
        ),
        Peer(
            name="transformers",
            title="transformers",
            distribution="transformers",
            variants={"float32": ("float32",), "bfloat16": ("bfloat16",)},
            requirements=("torch", "transformers"),
            converts=False,
            multiplies={"bfloat16": "bfloat16"},
        ),
    )
}
