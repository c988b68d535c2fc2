//! Messages of a server, cut out of a byte stream. Pure.
//!
//! postgres-protocol reads them; what stands here is the bound on their size and the one message
//! that it does not know, `CopyBothResponse` (`W`), which only replication uses.

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, ErrorFields, Header, Message};

use super::error::{ServerError, SourceError};
use crate::limits::SOURCE_MESSAGE_BYTES_MAX;

/// Tag of `CopyBothResponse`.
const COPY_BOTH_RESPONSE: u8 = b'W';
/// Length of the tag and the length word, in bytes.
const HEADER_BYTES: usize = 5;

/// One message.
pub enum Backend {
    /// Data may now flow both ways.
    CopyBoth,
    /// Any other message.
    Message(Message),
}

/// Takes the first message off `input`; `None` when it is not there in full yet.
pub fn take(input: &mut BytesMut, during: &'static str) -> Result<Option<Backend>, SourceError> {
    let malformed = |error: std::io::Error| SourceError::protocol(during, error.to_string());
    let Some(header) = Header::parse(input).map_err(malformed)? else { return Ok(None) };
    // The length counts itself but not the tag.
    let total = usize::try_from(header.len()).unwrap_or(0).saturating_add(1);
    if !(HEADER_BYTES..=SOURCE_MESSAGE_BYTES_MAX).contains(&total) {
        let tag = char::from(header.tag()).escape_default();
        let detail = format!("a message '{tag}' of {total} bytes");
        return Err(SourceError::protocol(during, detail));
    }
    if input.len() < total {
        return Ok(None);
    }
    if header.tag() == COPY_BOTH_RESPONSE {
        drop(input.split_to(total));
        return Ok(Some(Backend::CopyBoth));
    }
    Ok(Message::parse(input).map_err(malformed)?.map(Backend::Message))
}

/// Reads the fields of an `ErrorResponse` or `NoticeResponse`. What cannot be read is left out:
/// half an error text is worth more than an error about the error.
pub fn server_error(mut fields: ErrorFields<'_>) -> ServerError {
    let mut error = ServerError::default();
    while let Ok(Some(field)) = fields.next() {
        let slot = match field.type_() {
            // 'V' is the severity that is never translated; 'S' comes first.
            b'S' | b'V' => &mut error.severity,
            b'C' => &mut error.code,
            b'M' => &mut error.message,
            b'D' => &mut error.detail,
            b'H' => &mut error.hint,
            _ => continue,
        };
        *slot = String::from_utf8_lossy(field.value_bytes()).into_owned();
    }
    error
}

/// Columns of a row, as text.
pub fn row(body: &DataRowBody, during: &'static str) -> Result<Vec<Option<String>>, SourceError> {
    let malformed = |error: std::io::Error| SourceError::protocol(during, error.to_string());
    let mut columns = Vec::new();
    let mut ranges = body.ranges();
    while let Some(range) = ranges.next().map_err(malformed)? {
        let bytes = match range {
            Some(range) => body.buffer().get(range),
            None => None,
        };
        let text = bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        columns.push(text);
    }
    Ok(columns)
}

/// Checks `server_version`: only PostgreSQL 15 writes the WAL and the files that we read.
pub fn check_version(text: &str) -> Result<(), SourceError> {
    let major: String = text.chars().take_while(char::is_ascii_digit).collect();
    match major.as_str() {
        "15" => Ok(()),
        _ => Err(SourceError::Version { version: text.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn only_version_15_is_taken() {
        for good in ["15.20 (Debian 15.20-0+deb12u1)", "15.0", "15beta1", "15"] {
            assert_eq!(check_version(good), Ok(()), "{good}");
        }
        for bad in ["14.9", "16.2", "150.1", "1.5", "", "x15", "9.6.15"] {
            let error = check_version(bad).unwrap_err();
            assert!(error.to_string().contains("PostgreSQL 15 only"), "{error}");
        }
    }

    #[test]
    fn oversized_and_undersized_messages_are_refused_before_they_are_read() {
        for len in [0u32, 3, SOURCE_MESSAGE_BYTES_MAX as u32, u32::MAX, 1 << 31] {
            let mut input = BytesMut::from(&[b'd'][..]);
            input.extend_from_slice(&len.to_be_bytes());
            let before = input.capacity();
            assert!(take(&mut input, "testing").is_err(), "length {len} was taken");
            assert_eq!(input.capacity(), before, "memory was reserved for length {len}");
        }
    }

    #[test]
    fn messages_come_out_whole_however_they_arrive() {
        let mut bytes = message(b'W', &[0, 0, 0]);
        bytes.extend(message(b'd', b"data"));
        bytes.extend(message(b'E', b"SFATAL\0C28P01\0Mno\0Dd\0Hh\0\0"));
        let mut input = BytesMut::new();
        let mut seen = Vec::new();
        for byte in bytes {
            input.extend_from_slice(&[byte]);
            while let Some(message) = take(&mut input, "testing").unwrap() {
                seen.push(match message {
                    Backend::CopyBoth => "both".to_owned(),
                    Backend::Message(Message::CopyData(body)) => {
                        String::from_utf8(body.data().to_vec()).unwrap()
                    }
                    Backend::Message(Message::ErrorResponse(body)) => {
                        server_error(body.fields()).to_string()
                    }
                    Backend::Message(_) => "other".to_owned(),
                });
            }
        }
        let error = "FATAL: no (SQLSTATE 28P01); detail: d; hint: h";
        assert_eq!(seen, ["both", "data", error]);
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_message_an_error_or_waiting(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            tag in proptest::sample::select(b"RSKZTDCEdcHWGNIAn".to_vec()),
            frame in any::<bool>(),
        ) {
            let framed = if frame { message(tag, &bytes) } else { bytes };
            let mut input = BytesMut::from(&framed[..]);
            while let Ok(Some(message)) = take(&mut input, "testing") {
                match message {
                    Backend::Message(Message::DataRow(body)) => { let _ = row(&body, "testing"); }
                    Backend::Message(Message::ErrorResponse(body)) => {
                        let _ = server_error(body.fields()).to_string();
                    }
                    _ => {}
                }
            }
            let _ = Bytes::from(framed);
        }
    }
}
