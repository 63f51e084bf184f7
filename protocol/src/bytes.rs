//! Laying out and taking apart little-endian bytes by hand, with every length checked.

/// The bytes end before the field does, or hold what the field may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// Fewer bytes than the field needs.
    #[error("the bytes end inside the field `{0}`")]
    Short(&'static str),
    /// A value that the field may not have.
    #[error("the field `{0}` has a value that is not allowed")]
    Value(&'static str),
    /// Bytes after the last field.
    #[error("{0} bytes after the last field")]
    Trailing(usize),
}

/// Reads fields one after the other.
#[derive(Clone)]
pub struct FieldReader<'a> {
    rest: &'a [u8],
}

impl<'a> FieldReader<'a> {
    /// From the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], FieldError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(FieldError::Short(field))?;
        self.rest = rest;
        Ok(head)
    }
    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FieldError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(FieldError::Short(field))?;
        self.rest = rest;
        Ok(*head)
    }
    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, FieldError> {
        self.array::<1>(field).map(|[b]| b)
    }
    /// Two bytes.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, FieldError> {
        self.array(field).map(u16::from_le_bytes)
    }
    /// Four bytes.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, FieldError> {
        self.array(field).map(u32::from_le_bytes)
    }
    /// Eight bytes.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, FieldError> {
        self.array(field).map(u64::from_le_bytes)
    }
    /// Eight bytes, signed.
    pub fn i64(&mut self, field: &'static str) -> Result<i64, FieldError> {
        self.array(field).map(i64::from_le_bytes)
    }
    /// A count of items of at least `item` bytes each that must still be here, and at most `max`.
    pub fn count(&mut self, max: usize, item: usize, field: &'static str) -> Result<usize, FieldError> {
        let n = self.u32(field)? as usize;
        if n > max || n.checked_mul(item).is_none_or(|b| b > self.rest.len()) {
            return Err(FieldError::Value(field));
        }
        Ok(n)
    }
    /// A text with a one-byte length before it.
    pub fn text(&mut self, field: &'static str) -> Result<&'a str, FieldError> {
        let n = usize::from(self.u8(field)?);
        std::str::from_utf8(self.bytes(n, field)?).map_err(|_| FieldError::Value(field))
    }
    /// Nothing may be left.
    pub fn finish(self) -> Result<(), FieldError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FieldError::Trailing(self.rest.len())) }
    }
}

/// Writes fields one after the other.
pub trait FieldWriter {
    /// Two bytes.
    fn put_u16(&mut self, v: u16);
    /// Four bytes.
    fn put_u32(&mut self, v: u32);
    /// Eight bytes.
    fn put_u64(&mut self, v: u64);
    /// Eight bytes, signed.
    fn put_i64(&mut self, v: i64);
    /// A text of at most 255 bytes with a one-byte length before it.
    fn put_text(&mut self, v: &str);
}

impl FieldWriter for Vec<u8> {
    fn put_u16(&mut self, v: u16) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_u32(&mut self, v: u32) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_u64(&mut self, v: u64) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_i64(&mut self, v: i64) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_text(&mut self, v: &str) {
        let n = u8::try_from(v.len()).expect("texts in formats are names of at most 63 bytes");
        self.push(n);
        self.extend_from_slice(v.as_bytes());
    }
}
