//! TEMP
use std::collections::BTreeMap;
use crate::error::Result;
/// TEMP
pub struct ChatTemplate;
impl ChatTemplate {
    /// TEMP
    pub fn new(_source: &str, _special: &BTreeMap<String, String>) -> Result<Self> { Ok(Self) }
}
