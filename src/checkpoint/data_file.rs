//! A regular file that several threads read at once, each at its own place.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(crate) struct DataFile {
    file: File,
    path: PathBuf,
    len: u64,
}

impl DataFile {
    /// Opens a regular file. Anything else is refused before it is opened: opening a pipe would wait
    /// for a writer, and a device has no end.
    pub(super) fn open(path: &Path) -> Result<DataFile> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(DataFile { file, path: path.to_owned(), len })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its length in bytes when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from byte `offset` on.
    pub(crate) fn read_exact_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        self.fill(out, offset).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => Error::FileShrank {
                path: self.path.clone(),
                offset,
                bytes: out.len(),
                opened_bytes: self.len,
            },
            _ => Error::Io { path: self.path.clone(), source },
        })
    }

    #[cfg(unix)]
    fn fill(&self, out: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }

    #[cfg(windows)]
    fn fill(&self, out: &mut [u8], offset: u64) -> std::io::Result<()> {
        let (mut out, mut offset) = (out, offset);
        while !out.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(&self.file, out, offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    out = &mut out[n..];
                    offset += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
