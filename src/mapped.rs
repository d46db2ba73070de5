//! Memory for what is streamed: lines of a cache, and packed weights on huge pages.

use memmap2::MmapMut;
use std::ops::Range;
use std::sync::Arc;

/// A line of a cache: memory that is moved, aligned and given out as one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

// SAFETY: any bits are a line, all zeros too, and it has no padding.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; it has no interior mutability and no pointers.
unsafe impl bytemuck::Pod for Line {}

/// Zeroed memory that starts on a huge page where the system gives them.
pub struct Arena {
    map: MmapMut,
    start: usize,
    len: usize,
}

/// The size of a huge page on x86-64, and of most on aarch64.
const HUGE_PAGE: usize = 2 << 20;

impl Arena {
    /// `len` zeroed bytes; pages are taken from the system as they are first written.
    ///
    /// # Errors
    /// What the operating system says, such as out of memory.
    pub fn new(len: usize) -> std::io::Result<Arena> {
        let total = len.checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let map = MmapMut::map_anon(total)?;
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        // Fewer pages mean fewer address translations; refused requests change nothing but speed.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Arena { map, start, len })
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }

    /// Ends the filling: from here on the bytes are shared and constant.
    pub fn freeze(self) -> Arc<Arena> {
        Arc::new(self)
    }
}

/// A constant piece of an [`Arena`].
#[derive(Clone)]
pub struct Slab {
    arena: Arc<Arena>,
    range: Range<usize>,
}

impl Slab {
    /// Bytes `range` of the arena.
    ///
    /// # Panics
    /// When the range lies outside of it.
    pub fn new(arena: &Arc<Arena>, range: Range<usize>) -> Slab {
        assert!(range.start <= range.end && range.end <= arena.len);
        Slab { arena: Arc::clone(arena), range }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.arena.map[self.arena.start + self.range.start..self.arena.start + self.range.end]
    }
}
