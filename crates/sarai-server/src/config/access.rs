//! Who may ask.

use std::fmt;

/// Keys, and origins of web pages.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// One of them must be sent; with none, everybody may ask.
    pub keys: Vec<String>,
    /// Origins beside those of this machine; `*` is all.
    pub origins: Vec<String>,
}

/// Keys are nobody's to read.
impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("keys", &self.keys.len()).field("origins", &self.origins).finish()
    }
}
