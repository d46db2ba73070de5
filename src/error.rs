//! Everything that can go wrong, one variant a failure, each naming the tensor, the field or the file.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `GPT2RS_ISA` names an instruction set that does not exist.
    #[error("GPT2RS_ISA is {0:?}; it must be one of portable, avx2, avxvnni, avx512, avx512vnni, avx512bf16")]
    UnknownIsa(String),
    /// `GPT2RS_ISA` names an instruction set that this machine lacks.
    #[error("GPT2RS_ISA is {0:?}, which this machine does not have")]
    MissingIsa(&'static str),
    /// A file could not be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {token} is out of the vocabulary (0 to {})", n_vocab - 1)]
    TokenOutOfRange {
        /// The id given.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// A sequence would grow past the last learned position.
    #[error("{wanted} tokens do not fit: the model has {n_ctx} positions (n_ctx)")]
    ContextOverflow {
        /// Length that the sequence would have.
        wanted: usize,
        /// Positions of the model.
        n_ctx: usize,
    },
    /// A config is longer than any real one.
    #[error("the config has {bytes} bytes; at most {limit} are read")]
    ConfigTooLong {
        /// Its length.
        bytes: usize,
        /// The longest that is read.
        limit: usize,
    },
    /// A config is not JSON; NaN and Infinity, which JSON lacks, end up here.
    #[error("the config is not valid JSON, near `{near}`: {source}")]
    ConfigSyntax {
        /// The text around the place.
        near: String,
        /// What the parser expected there.
        source: serde_json::Error,
    },
    /// A config is JSON but not an object.
    #[error("the config must be a JSON object, found {found}")]
    ConfigNotObject {
        /// What it is.
        found: String,
    },
    /// A field of a config has a wrong type or value.
    #[error("config field {field}: expected {expected}, found {found}")]
    ConfigField {
        /// The field, by the name that the config uses.
        field: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A config lacks a size.
    #[error("config field {field} is missing (its other names are {other_names})")]
    ConfigMissing {
        /// The field's usual name.
        field: &'static str,
        /// Names that would have counted too.
        other_names: String,
    },
    /// A config gives one size twice, and differently.
    #[error("config fields {field} ({value}) and {other_field} ({other_value}) mean the same and must agree")]
    ConfigConflict {
        /// A field.
        field: &'static str,
        /// What it says.
        value: usize,
        /// Another name of that field.
        other_field: &'static str,
        /// What it says there.
        other_value: usize,
    },
    /// No published model has that name.
    #[error("unknown preset {name:?}; it must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl")]
    UnknownPreset {
        /// The name given.
        name: String,
    },
    /// A path that should be a file is a directory, a pipe or a device.
    #[error("{path}: not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file ended before the place where it ended when it was opened.
    #[error(
        "{path}: could not read {bytes} bytes from byte {offset} on; the file had {opened_bytes} bytes \
         when it was opened and is shorter now"
    )]
    FileShrank {
        /// The file.
        path: PathBuf,
        /// Where reading began.
        offset: u64,
        /// Bytes wanted from there.
        bytes: usize,
        /// Its length when it was opened.
        opened_bytes: u64,
    },
    /// A safetensors file ends inside its header.
    #[error(
        "{path}: the header needs {wanted} bytes, the file has {file_bytes}; it is cut short or no safetensors file"
    )]
    HeaderTruncated {
        /// The file.
        path: PathBuf,
        /// Bytes up to the end of the header.
        wanted: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// A safetensors file claims a header longer than the format allows.
    #[error(
        "{path}: the header claims {bytes} bytes, at most {limit} are allowed; is this a safetensors file?"
    )]
    HeaderTooLong {
        /// The file.
        path: PathBuf,
        /// The length claimed.
        bytes: u64,
        /// The longest that is allowed.
        limit: u64,
    },
    /// A safetensors header is not the JSON it should be.
    #[error("{path}: malformed safetensors header: {reason}")]
    HeaderSyntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// A tensor's bytes do not begin where those of the tensor before end.
    #[error(
        "{path}: tensor {name} claims bytes {begin} to {end} of the data, expected it to begin at \
         {expected} and end no earlier (tensors neither overlap nor leave gaps)"
    )]
    TensorOffsets {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
        /// Where it claims to begin.
        begin: u64,
        /// Where it claims to end.
        end: u64,
        /// Where it has to begin.
        expected: u64,
    },
    /// A tensor's shape and type do not agree with the bytes it claims.
    #[error(
        "{path}: tensor {name} of type {dtype} and shape {shape:?} takes {expected} bytes, its offsets span {found}"
    )]
    TensorBytes {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
        /// Its type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes by shape and type.
        expected: u64,
        /// Bytes by its offsets.
        found: u64,
    },
    /// A safetensors file is shorter or longer than its tensors.
    #[error("{path}: the tensors take {expected} bytes, the file holds {found} after its header")]
    DataLength {
        /// The file.
        path: PathBuf,
        /// Bytes that the header asks for.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A tensor has a size that no memory can hold.
    #[error("tensor {name}: shape {shape:?} is too large")]
    TensorTooLarge {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor of packed 4- or 6-bit elements ends inside a byte.
    #[error("tensor {name}: {dtype} elements of shape {shape:?} do not fill whole bytes")]
    TensorBits {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two files of one checkpoint have a tensor of the same name.
    #[error("{path}: tensor {name} is in another file of the checkpoint already")]
    DuplicateTensor {
        /// The tensor.
        name: String,
        /// The second file that has it.
        path: PathBuf,
    },
    /// A tensor's place is not inside its file.
    #[error("{path}: tensor {name} takes {bytes} bytes from byte {offset} on, the file has {file_bytes}")]
    TensorOutsideFile {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        bytes: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// An array does not fill its shape.
    #[error("tensor {name}: shape {shape:?} takes {} elements, found {found}", shape.iter().product::<usize>())]
    ArrayLength {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Elements given.
        found: usize,
    },
    /// Only a matrix can be stored transposed.
    #[error("tensor {name}: only a matrix can be stored transposed, found shape {shape:?}")]
    TransposedShape {
        /// The tensor.
        name: String,
        /// Its stored shape.
        shape: Vec<usize>,
    },
    /// A tensor cannot be appended to the one of its name.
    #[error("tensor {name}: stored shape {second:?} cannot be appended to {first:?} along dimension 0")]
    AppendMismatch {
        /// The tensor.
        name: String,
        /// The stored shape that is there.
        first: Vec<usize>,
        /// The stored shape to be appended.
        second: Vec<usize>,
    },
    /// A tensor is not in the checkpoint.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A weight is stored in a type that holds no weights.
    #[error("{path}: tensor {name} is stored as {dtype}; weights must be F32, F16, BF16 or F64")]
    UnsupportedStoredType {
        /// The tensor.
        name: String,
        /// Its type, as the file names it.
        dtype: String,
        /// The file.
        path: PathBuf,
    },
    /// No stored type has that name.
    #[error("unknown type {name:?}; it must be one of float32, float16, bfloat16, float64")]
    UnknownStoredType {
        /// The name given.
        name: String,
    },
    /// A tensor is none that a GPT-2 has.
    #[error("tensor {name} is not one of a GPT-2 model of this config")]
    UnexpectedTensor {
        /// The tensor, as the checkpoint names it.
        name: String,
    },
    /// Two names of a checkpoint mean one tensor.
    #[error("tensor {name} is there twice, with and without `transformer.` before it")]
    AmbiguousTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor's shape is not the config's.
    #[error("tensor {name}: expected shape {expected:?} by the config, found {found:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// What the config says.
        expected: Vec<usize>,
        /// What the checkpoint holds.
        found: Vec<usize>,
    },
    /// An embedding is stored transposed, which no format does.
    #[error("tensor {name}: an embedding must be stored (tokens, channels), not transposed")]
    TransposedEmbedding {
        /// The tensor.
        name: String,
    },
    /// No type of weights has that name.
    #[error("dtype must be float32, bfloat16, int8 or int4, found {name:?}")]
    UnknownDtype {
        /// The name given.
        name: String,
    },
    /// No type of caches has that name.
    #[error("kv_dtype must be float32, bfloat16 or int8, found {name:?}")]
    UnknownKvDtype {
        /// The name given.
        name: String,
    },
    /// No precision has that name.
    #[error("precision must be exact or fast, found {name:?}")]
    UnknownPrecision {
        /// The name given.
        name: String,
    },
    /// Activations are rounded to bfloat16 only beside weights that are.
    #[error("precision \"fast\" is for bfloat16 weights; these are {dtype}")]
    FastDtype {
        /// The weights' type.
        dtype: &'static str,
    },
    /// Weights that were rounded to integers are no longer those of a checkpoint.
    #[error(
        "{dtype} weights can't be saved as a checkpoint; save float32 or bfloat16 ones, or convert the model"
    )]
    SaveQuantised {
        /// The weights' type.
        dtype: &'static str,
    },
    /// A packed file says something else of itself than it may.
    #[error("{path}: packed weights: {field} must be {expected}, found {found}")]
    PackedField {
        /// The file.
        path: PathBuf,
        /// The field of the header's metadata.
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A packed file was written for kernels that read weights in another order.
    #[error(
        "{path}: the weights are packed as {found:?}, this version reads {expected:?}; convert the model again \
         (gpt2rs convert)"
    )]
    PackedLayout {
        /// The file.
        path: PathBuf,
        /// What this version reads.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// Packed weights stay in the type that they were packed in.
    #[error(
        "{path}: the weights are packed as {held}, dtype is {asked}; leave dtype out, or convert the model again"
    )]
    PackedDtype {
        /// The file.
        path: PathBuf,
        /// The file's type.
        held: &'static str,
        /// The type asked for.
        asked: &'static str,
    },
    /// A packed file's own config is not the one that is to be used.
    #[error("{path}: the packed file's own config is another than the one given")]
    PackedConfig {
        /// The file.
        path: PathBuf,
    },
    /// A matrix of a packed file is not stored as packed bytes.
    #[error("tensor {name}: expected packed bytes, a vector of U8, found {dtype} of shape {shape:?}")]
    NotPacked {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Packed bytes are not as many as the matrix takes.
    #[error("tensor {name}: a packed ({k}, {n}) {dtype} matrix takes {expected} bytes, found {found}")]
    PackedBytes {
        /// The tensor.
        name: String,
        /// Rows by the config.
        k: usize,
        /// Columns by the config.
        n: usize,
        /// The type it is held in.
        dtype: &'static str,
        /// Bytes by shape and type.
        expected: usize,
        /// Bytes in the file.
        found: usize,
    },
    /// Packed bytes do not begin at a cache line.
    #[error("tensor {name}: packed bytes must begin at a multiple of 64 in the file, found {offset}")]
    PackedPlace {
        /// The tensor.
        name: String,
        /// Where they begin.
        offset: u64,
    },
    /// Weights, or what a trainer computes with, do not fit into memory.
    #[error("no memory for {bytes} bytes: {source}")]
    OutOfMemory {
        /// What is needed.
        bytes: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The system gives no more threads.
    #[error("could not start {n_threads} threads: {source}")]
    Threads {
        /// How many were wanted.
        n_threads: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Something that follows from a sequence was asked for before it had a token.
    #[error(
        "the sequence is empty: there is nothing to continue (a text can start with the end-of-text token)"
    )]
    EmptySequence,
    /// A generation setting is out of its range.
    #[error("{setting} is {value}; it must be {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// Its range.
        expected: String,
    },
    /// No token can follow: the greatest score is not a finite number.
    #[error(
        "no token can be chosen after {position} tokens: the greatest score is {greatest} \
         (every token is banned, or the logits are not finite)"
    )]
    NoCandidate {
        /// How many tokens came before.
        position: usize,
        /// -inf when all are banned or NaN, inf when a logit overflowed.
        greatest: f32,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}
