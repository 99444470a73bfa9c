//! Puts what was measured into the document, between the marks that stand there. The rest of it is written by hand.

use std::fs;
use std::io;
use std::path::Path;

/// Replaces what stands between the marks called `name`.
///
/// # Errors
///
/// The document cannot be read or written, or has no such marks.
pub(crate) fn replace(document: &Path, name: &str, text: &str) -> io::Result<()> {
    let old = fs::read_to_string(document)?;
    let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
    let missing = || io::Error::other(format!("{} has no place for {name}", document.display()));
    let (before, rest) = old.split_once(&begin).ok_or_else(missing)?;
    let (_, after) = rest.split_once(&end).ok_or_else(missing)?;
    fs::write(document, format!("{before}{begin}\n{}\n\n{end}{after}", text.trim_end()))
}
