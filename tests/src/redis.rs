//! A small redis client: the protocol RESP2, one command at a time, every wait with a deadline.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use thiserror::Error;

/// Longest value that is taken from a server, in bytes.
pub const BULK_BYTES_MAX: usize = 16 << 20;
/// Most elements of an array.
const ARRAY_ITEMS_MAX: usize = 1 << 20;
/// Longest line: a status, an error or a length.
const LINE_BYTES_MAX: u64 = 4096;

/// An answer of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A status such as `OK`.
    Status(String),
    /// A number.
    Integer(i64),
    /// A value, or `None` where there is none.
    Bulk(Option<Vec<u8>>),
    /// Several answers.
    Array(Vec<Reply>),
}

/// Why a command failed.
#[derive(Debug, Error)]
pub enum RedisError {
    /// The server did not answer in time or went away. Whether it did what it was told is unknown.
    #[error("redis connection")]
    Connection(#[from] std::io::Error),
    /// The server refuses: it has not done it.
    #[error("redis refuses: {0}")]
    Refused(String),
    /// The bytes are not RESP, or exceed a limit.
    #[error("odd answer of redis: {0}")]
    Protocol(String),
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects; `timeout` holds for connecting and for every later read and write.
    pub fn connect(address: SocketAddr, timeout: Duration) -> Result<Self, RedisError> {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        let client = Self { stream: BufReader::new(stream) };
        client.set_timeout(timeout)?;
        Ok(client)
    }

    /// Changes the deadline of every later read and write.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), RedisError> {
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        Ok(self.stream.get_ref().set_write_timeout(Some(timeout))?)
    }

    /// Sends a command and waits for its answer. After an error of the connection, drop the client.
    pub fn command(&mut self, words: &[&[u8]]) -> Result<Reply, RedisError> {
        let mut message = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            message.extend(format!("${}\r\n", word.len()).into_bytes());
            message.extend_from_slice(word);
            message.extend(b"\r\n");
        }
        self.stream.get_mut().write_all(&message)?;
        read_reply(&mut self.stream)
    }

    /// `SET key value`.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<(), RedisError> {
        self.command(&[b"SET", key.as_bytes(), value]).map(drop)
    }

    /// `GET key`.
    pub fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, RedisError> {
        match self.command(&[b"GET", key.as_bytes()])? {
            Reply::Bulk(value) => Ok(value),
            other => Err(RedisError::Protocol(format!("{other:?} to GET"))),
        }
    }

    /// `PING`.
    pub fn ping(&mut self) -> Result<(), RedisError> {
        self.command(&[b"PING"]).map(drop)
    }
}

/// Reads one answer. Limits hold before anything is allocated.
fn read_reply(input: &mut impl BufRead) -> Result<Reply, RedisError> {
    let line = read_line(input)?;
    let (kind, rest) = line.split_at_checked(1).ok_or_else(|| odd(&line))?;
    match kind {
        "+" => Ok(Reply::Status(rest.to_owned())),
        "-" => Err(RedisError::Refused(rest.to_owned())),
        ":" => rest.parse().map(Reply::Integer).map_err(|_error| odd(&line)),
        "$" if rest == "-1" => Ok(Reply::Bulk(None)),
        "$" => {
            let length = length(rest, BULK_BYTES_MAX).ok_or_else(|| odd(&line))?;
            let mut bytes = vec![0; length + 2];
            input.read_exact(&mut bytes)?;
            if !bytes.ends_with(b"\r\n") {
                return Err(odd("a value without its end"));
            }
            bytes.truncate(length);
            Ok(Reply::Bulk(Some(bytes)))
        }
        "*" => {
            let length = length(rest, ARRAY_ITEMS_MAX).ok_or_else(|| odd(&line))?;
            (0..length).map(|_| read_reply(input)).collect::<Result<_, _>>().map(Reply::Array)
        }
        _ => Err(odd(&line)),
    }
}

fn read_line(input: &mut impl BufRead) -> Result<String, RedisError> {
    let mut line = String::new();
    input.take(LINE_BYTES_MAX).read_line(&mut line)?;
    match line.strip_suffix("\r\n") {
        Some(text) => Ok(text.to_owned()),
        None if line.is_empty() => {
            Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())
        }
        None => Err(odd(&line)),
    }
}

fn length(text: &str, limit: usize) -> Option<usize> {
    text.parse().ok().filter(|&length| length <= limit)
}

fn odd(text: &str) -> RedisError {
    RedisError::Protocol(text.escape_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_answer_is_read() {
        let mut input: &[u8] = b"+OK\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n";
        let mut next = || read_reply(&mut input).unwrap();
        assert_eq!(next(), Reply::Status("OK".into()));
        assert_eq!(next(), Reply::Integer(-7));
        assert_eq!(next(), Reply::Bulk(Some(b"a\r\n".into())));
        assert_eq!(next(), Reply::Bulk(None));
        assert_eq!(next(), Reply::Array(vec![Reply::Integer(1), Reply::Bulk(Some(vec![]))]));
    }

    #[test]
    fn odd_answers_are_errors_and_lengths_are_capped() {
        for text in
            ["$99999999999\r\n", "*-2\r\n", "?\r\n", "\r\n", "$1\r\nabc", ":x\r\n", "$2\r\nab"]
        {
            assert!(read_reply(&mut text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
