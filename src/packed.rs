//! Packed files: weights as the kernels hold them, which are opened without packing.
//!
//! A packed file is a safetensors file. Its matrices are vectors of bytes under the checkpoint's names, panels as
//! [`crate::ops::panels`] lays them out, each at a cache line; what is held in float32 follows as such. The header's
//! metadata has `format`, `layout`, `dtype` and the model's config. [`layout`] names the order of the bytes, and changes
//! when they do, so that a file of another version is refused rather than misread.

use crate::checkpoint::{Checkpoint, DataFile};
use crate::config::{Config, Dtype};
use crate::error::{Error, Result};
use crate::mapped::Arena;
use crate::ops::pairs::{Bf16, F32};
use crate::ops::panels::{Format, Int4Groups, Int8Groups, NR, Panels};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What the metadata's `format` says.
const FORMAT: &str = "gpt2rs";
/// Where a panel may begin: the kernels take whole cache lines.
const LINE: u64 = 64;
/// The data begin at a page.
const PAGE: usize = 4096;
/// Bytes that are written or read at once. Whole huge pages: file systems that keep large pieces of a file together then
/// have them on huge pages when the file is mapped.
const BLOCK: usize = 8 << 20;

/// The data of one tensor of a packed file.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// A packed matrix.
    Matrix(&'a [u8]),
    /// Values of this shape.
    Floats(&'a [f32], &'a [usize]),
}

impl<'a> Data<'a> {
    fn bytes(self) -> &'a [u8] {
        match self {
            Data::Matrix(bytes) => bytes,
            Data::Floats(values, _) => bytemuck::cast_slice(values),
        }
    }

    fn info(self, begin: usize) -> Value {
        let (dtype, shape) = match self {
            Data::Matrix(bytes) => ("U8", vec![bytes.len()]),
            Data::Floats(_, shape) => ("F32", shape.to_vec()),
        };
        json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, begin + self.bytes().len()] })
    }
}

/// The name of the order in which weights of `dtype` lie: the width of a panel, and for each format in it the rows and
/// bytes of a group, and a checksum of what a group of certain bytes stands for.
pub fn layout(dtype: Dtype) -> String {
    let formats = match dtype {
        Dtype::F32 => name_of::<F32>("float32"),
        Dtype::BF16 => name_of::<Bf16>("bfloat16"),
        Dtype::Int8 => name_of::<Int8Groups>("int8"),
        Dtype::Int4 => name_of::<Int4Groups>("int4"),
    };
    // Which matrices are rotated, and how, belongs to it: `weights::rotated_by`.
    let rotated = if dtype.is_integer() { "/c_proj-rotated-16" } else { "" };
    format!("panels-{NR}/{formats}{rotated}")
}

fn name_of<F: Format>(name: &str) -> String {
    // Every second byte of any value, the others small enough for scales and floats to be finite.
    let byte = |i: usize| (i * 151 % 256) as u8 & if i.is_multiple_of(2) { 0xff } else { 0x3f };
    let mut panel = vec![0_u64; Panels::<F>::panel_len(F::GROUP) / 8];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut panel);
    bytes.iter_mut().enumerate().for_each(|(i, out)| *out = byte(i));
    let values = (0..F::GROUP).flat_map(|k| (0..NR).map(move |column| (k, column)));
    // FNV-1a.
    let sum = values
        .flat_map(|(k, column)| F::value(bytes, k, column).to_le_bytes())
        .fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("{name}-{}-{}-{sum:08x}", F::GROUP, F::GROUP_BYTES)
}

/// Writes a packed file of these tensors.
///
/// # Errors
/// [`Error::Io`], such as a full disk; what has been written by then stays.
pub fn write(path: &Path, config: &Config, dtype: Dtype, tensors: &[(String, Data<'_>)]) -> Result<()> {
    let is_matrix = |(_, data): &&(String, Data<'_>)| matches!(data, Data::Matrix(_));
    // Packed matrices are whole cache lines, so that all stay aligned as long as nothing comes between.
    let (matrices, floats): (Vec<_>, Vec<_>) = tensors.iter().partition(is_matrix);
    let ordered: Vec<&(String, Data<'_>)> = matrices.into_iter().chain(floats).collect();
    let mut header = Map::new();
    header.insert(
        "__metadata__".to_owned(),
        json!({
            "format": FORMAT,
            "layout": layout(dtype),
            "dtype": dtype.name(),
            "config": config.to_json(),
        }),
    );
    let mut end = 0;
    for (name, data) in &ordered {
        header.insert(name.clone(), data.info(end));
        end += data.bytes().len();
    }
    let mut header = Value::Object(header).to_string();
    let padding = (8 + header.len()).next_multiple_of(PAGE) - 8 - header.len();
    header.extend(std::iter::repeat_n(' ', padding));

    let write = || {
        let mut blocks = Blocks { file: File::create(path)?, block: Vec::with_capacity(BLOCK) };
        blocks.write(&(header.len() as u64).to_le_bytes())?;
        blocks.write(header.as_bytes())?;
        for (_, data) in &ordered {
            blocks.write(data.bytes())?;
        }
        blocks.file.write_all(&blocks.block)
    };
    write().map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// A file that is written in whole blocks.
struct Blocks {
    file: File,
    block: Vec<u8>,
}

impl Blocks {
    fn write(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK {
                self.file.write_all(&self.block)?;
                self.block.clear();
            }
        }
        Ok(())
    }
}

/// A packed file, whose header has been read.
pub struct Packed<'a> {
    /// The model's config.
    pub config: Config,
    /// The type of its matrices.
    pub dtype: Dtype,
    checkpoint: &'a Checkpoint,
    file: &'a DataFile,
}

impl<'a> Packed<'a> {
    /// The packed file that a checkpoint is; None for one of another format.
    ///
    /// # Errors
    /// [`Error::PackedField`], [`Error::PackedLayout`], or what [`Config::from_json`] says.
    pub fn of(checkpoint: &'a Checkpoint) -> Result<Option<Packed<'a>>> {
        let metadata = checkpoint.metadata();
        let Some(file) = checkpoint.only_file() else { return Ok(None) };
        if metadata.get("format").is_none_or(|format| format != FORMAT) {
            return Ok(None);
        }
        let path = || file.path().to_owned();
        let field = |name| metadata.get(name).map_or("", String::as_str);
        let wrong =
            |field, expected: String, found| Error::PackedField { path: path(), field, expected, found };
        let dtype = Dtype::from_name(field("dtype")).map_err(|_| {
            wrong("dtype", "float32, bfloat16, int8 or int4".to_owned(), quoted(field("dtype")))
        })?;
        if field("layout") != layout(dtype) {
            let found = quoted(field("layout"));
            return Err(Error::PackedLayout { path: path(), expected: layout(dtype), found });
        }
        let config = Config::from_json(field("config"))
            .map_err(|error| wrong("config", "that of a GPT-2".to_owned(), format!("an error: {error}")))?;
        Ok(Some(Packed { config, dtype, checkpoint, file }))
    }

    /// Whether the file is what a caller expects it to be.
    ///
    /// # Errors
    /// [`Error::PackedConfig`], [`Error::PackedDtype`].
    pub fn check(&self, config: &Config, dtype: Dtype) -> Result<()> {
        let path = self.file.path().to_owned();
        if *config != self.config {
            return Err(Error::PackedConfig { path });
        }
        if dtype != self.dtype {
            return Err(Error::PackedDtype { path, held: self.dtype.name(), asked: dtype.name() });
        }
        Ok(())
    }

    /// Where a matrix lies, from the start of the file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::NotPacked`], [`Error::PackedPlace`].
    pub fn matrix(&self, name: &str) -> Result<Range<usize>> {
        let Range { start, end } = self.checkpoint.bytes(name)?;
        if start % LINE != 0 {
            return Err(Error::PackedPlace { name: name.to_owned(), offset: start });
        }
        // The header's reader has held them to the length of the file.
        Ok(start as usize..end as usize)
    }

    /// The file in memory up to the last matrix. It is mapped where that puts it on huge pages; elsewhere it is read into
    /// memory that lies on them, since weights on small pages are slower to stream.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Io`], [`Error::FileShrank`].
    pub fn open(&self, n_threads: usize) -> Result<Arc<Arena>> {
        let ends = self.checkpoint.names().filter_map(|name| self.checkpoint.bytes(name).ok());
        let len = ends.map(|range| range.end as usize).max().unwrap_or(0);
        if let Some(mapped) = Arena::of_file(self.file.file(), len) {
            return Ok(mapped.freeze());
        }
        let mut arena = Arena::new(len).map_err(|source| Error::OutOfMemory { bytes: len, source })?;
        let blocks: Vec<_> =
            arena.bytes_mut().chunks_mut(BLOCK).map(|block| Mutex::new(Some(block))).collect();
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(i) else { break };
            let block = block.lock().unwrap_or_else(PoisonError::into_inner).take();
            let block = block.expect("each block is taken once");
            if let Err(error) = self.file.read_exact_at(block, (i * BLOCK) as u64) {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                next.store(blocks.len(), Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(blocks.len()) {
                scope.spawn(work);
            }
            work();
        });
        drop(blocks);
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(arena.freeze()),
        }
    }
}

/// What a file says, no longer than a message should be.
fn quoted(text: &str) -> String {
    const LONGEST: usize = 100;
    text.chars().take(LONGEST).collect()
}
