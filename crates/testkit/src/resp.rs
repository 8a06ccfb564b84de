//! Where messages of Redis' protocol (RESP2) begin and end.

use std::io;

/// The first command in `bytes`, once it is whole: its length and its words.
pub(crate) fn command(bytes: &[u8]) -> io::Result<Option<(usize, Vec<Vec<u8>>)>> {
    let Some((b'*', count, mut at)) = header(bytes)? else { return Ok(None) };
    let mut words = Vec::new();
    for _ in 0..count {
        let Some((b'$', length, begin)) = header(&bytes[at..])? else { return Ok(None) };
        let (begin, length) = (at + begin, length as usize);
        at = begin + length + 2;
        if bytes.len() < at {
            return Ok(None);
        }
        words.push(bytes[begin..begin + length].to_vec());
    }
    Ok(Some((at, words)))
}

/// The length of the first reply in `bytes`, once it is whole.
pub(crate) fn reply(bytes: &[u8]) -> io::Result<Option<usize>> {
    match bytes.first() {
        Some(b'+' | b'-' | b':') => Ok(line(bytes).map(|line| line.len() + 2)),
        _ => match header(bytes)? {
            None => Ok(None),
            Some((_, ..0, at)) => Ok(Some(at)),
            Some((b'$', length, at)) => Ok(Some(at + length as usize + 2).filter(|end| *end <= bytes.len())),
            Some((_, count, mut at)) => {
                for _ in 0..count {
                    let Some(length) = reply(&bytes[at..])? else { return Ok(None) };
                    at += length;
                }
                Ok(Some(at))
            }
        },
    }
}

/// The first line without its end.
fn line(bytes: &[u8]) -> Option<&[u8]> {
    bytes.windows(2).position(|pair| pair == b"\r\n").map(|end| &bytes[..end])
}

/// What begins here, a `*` or a `$`, its number, and where the rest begins.
fn header(bytes: &[u8]) -> io::Result<Option<(u8, i64, usize)>> {
    let Some(line) = line(bytes) else { return Ok(None) };
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not RESP2: {}", line.escape_ascii()));
    let number = line.get(1..).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    match (line.first(), number) {
        (Some(kind @ (b'*' | b'$')), Some(number)) => Ok(Some((*kind, number, line.len() + 2))),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole_at_their_last_byte_and_not_sooner() {
        let command_bytes = b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n";
        for end in 0..command_bytes.len() {
            assert_eq!(command(&command_bytes[..end]).unwrap(), None, "{end}");
        }
        let more = [&command_bytes[..], b"*1"].concat();
        let words = vec![b"GET".to_vec(), b"a\r\nb".to_vec()];
        assert_eq!(command(&more).unwrap(), Some((command_bytes.len(), words)));
        for whole in [
            "+OK\r\n",
            "-ERR x\r\n",
            ":12\r\n",
            "$-1\r\n",
            "*-1\r\n",
            "*0\r\n",
            "$0\r\n\r\n",
            "$4\r\na\r\nb\r\n",
            "*3\r\n:1\r\n*2\r\n$1\r\nx\r\n$-1\r\n+a\r\n",
        ] {
            for end in 0..whole.len() {
                assert_eq!(reply(&whole.as_bytes()[..end]).unwrap(), None, "{whole:?} to {end}");
            }
            assert_eq!(reply(format!("{whole}:5\r\n").as_bytes()).unwrap(), Some(whole.len()), "{whole:?}");
        }
        assert!(command(b"PING\r\n").is_err() && reply(b"%1\r\n").is_err());
    }
}
