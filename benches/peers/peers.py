"""The peers: what a user would pick instead of gpt2rs, how each is installed, and in which widths it runs."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """One library.

    `name` is also the name of its module in workers/ and, where it has its own format, in convert/.
    `variants` says which of its forms run at a width; a width that is not there is one it does not have.
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


DTYPES = ("float32", "bfloat16", "int8", "int4")

GPT2RS = Peer(
    name="gpt2rs",
    title="gpt2rs",
    distribution="gpt2rs",
    variants={dtype: (dtype,) for dtype in DTYPES},
    converts=False,
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
        ),
        Peer(
            name="ctranslate2",
            title="CTranslate2",
            distribution="ctranslate2",
            variants={"float32": ("float32",), "int8": ("int8",)},
            requirements=("ctranslate2",),
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
        ),
        Peer(
            name="openvino",
            title="OpenVINO",
            distribution="openvino",
            variants={dtype: (dtype,) for dtype in DTYPES},
            requirements=("openvino",),
            conversion_requirements=("nncf",),
        ),
        Peer(
            name="transformers",
            title="transformers",
            distribution="transformers",
            variants={"float32": ("float32",), "bfloat16": ("bfloat16",)},
            requirements=("torch", "transformers"),
            converts=False,
        ),
    )
}
