//! A link's page as mapped memory.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::proto::layout::{Geometry, Page};
use crate::sys::memory::{self, Mapping, MemoryError};

/// The mapping of a link page, of a size that fits its geometry.
#[derive(Debug)]
pub(crate) struct LinkPage {
    mapping: Mapping,
    geometry: Geometry,
}

impl LinkPage {
    /// Makes a page, initialised, and the descriptor to send to the subscriber.
    pub(crate) fn create(geometry: Geometry) -> Result<(OwnedFd, Self), MemoryError> {
        let (fd, mapping) = memory::create_link_page(geometry.page_len())?;
        let page = Self { mapping, geometry };
        page.view().init(0);
        Ok((fd, page))
    }

    /// Maps the page that a publisher sent; its content is not trusted.
    pub(crate) fn open(fd: BorrowedFd<'_>, geometry: Geometry) -> Result<Self, MemoryError> {
        Ok(Self { mapping: memory::map_link_page(fd, geometry.page_len())?, geometry })
    }

    #[inline]
    pub(crate) fn view(&self) -> Page<'_> {
        // SAFETY: both constructors map exactly `geometry.page_len()` bytes, page-aligned, that live as long as
        // `self`; the object cannot shrink (sealed by `create_link_page`, checked by `map_link_page`). Only atomics
        // are made of it, so the peer may write it at any time.
        unsafe { Page::from_raw(self.mapping.as_ptr(), self.geometry) }
    }
}
