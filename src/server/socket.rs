//! What a connection runs over: a TCP socket, and TLS on it when the client asked for that.
//!
//! TLS is a state beside the socket ([`rustls::ServerConnection`] does no I/O): it moves with the
//! connection to the core that owns the client's tenant, with whatever it has received and not
//! given out yet.

use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::{AsyncRead, AsyncWrite};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};

use crate::config::Config;

/// A connection's bytes both ways, which a client may ask to encrypt.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// [`Stream::encrypt`] would do something.
    fn can_encrypt(&self) -> bool {
        false
    }

    /// From here on everything is encrypted: first, the client's handshake is expected.
    ///
    /// # Errors
    /// There is nothing to encrypt with.
    fn encrypt(&mut self) -> Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    /// Sends as much of the pieces, one after the other, as goes without waiting; returns how many
    /// bytes that was, none where this way does not exist. Nothing may be under way that was
    /// written before.
    ///
    /// # Errors
    /// Those of a write.
    fn send_now(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize> {
        let _ = pieces;
        Ok(0)
    }
}

/// The state of TLS on a connection.
pub type Tls = Box<ServerConnection>;

/// A socket of an executor; TLS runs on it, or may, or does not.
pub struct Socket<S> {
    raw: S,
    config: Option<Arc<ServerConfig>>,
    tls: Option<Tls>,
}

/// Certificate and key of the settings; `None` where there are none.
///
/// # Errors
/// They cannot be read, or do not belong together.
pub fn load(config: &Config) -> std::result::Result<Option<Arc<ServerConfig>>, String> {
    let (cert_file, key_file) = (&config.tls_cert_file, &config.tls_key_file);
    if cert_file.as_os_str().is_empty() {
        return Ok(None);
    }
    let bad = |name: &str, file: &Path, problem: String| {
        format!("setting {name}: {}: {problem}", file.display())
    };
    let certs = CertificateDer::pem_file_iter(cert_file)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| bad("tls_cert_file", cert_file, error.to_string()))?;
    if certs.is_empty() {
        return Err(bad("tls_cert_file", cert_file, "there is no certificate in it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|error| bad("tls_key_file", key_file, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(certs, key)
        .map_err(|error| bad("tls_key_file", key_file, error.to_string()))?;
    Ok(Some(Arc::new(config)))
}

impl<S> Socket<S> {
    /// A connection on `raw`; `tls` runs on it already, `config` is for one that does not yet.
    pub fn new(raw: S, config: Option<Arc<ServerConfig>>, tls: Option<Tls>) -> Socket<S> {
        Socket { raw, config, tls }
    }

    /// The socket under TLS, to set its options.
    pub fn raw(&self) -> &S {
        &self.raw
    }

    /// TLS runs on it.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// The socket, and TLS on it.
    pub fn into_parts(self) -> (S, Option<Tls>) {
        (self.raw, self.tls)
    }
}

impl<S: AsyncRead + AsyncWrite + AsRawFd + Unpin> Stream for Socket<S> {
    fn can_encrypt(&self) -> bool {
        self.config.is_some() && self.tls.is_none()
    }

    fn encrypt(&mut self) -> Result<()> {
        let config = self.config.clone().ok_or(ErrorKind::Unsupported)?;
        let tls = ServerConnection::new(config).map_err(Error::other)?;
        self.tls = Some(Box::new(tls));
        Ok(())
    }

    fn send_now(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize> {
        if self.tls.is_some() {
            return Ok(0);
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.raw.as_raw_fd(), pieces, &[], flags, None) {
            Ok(sent) => Ok(sent),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The socket as TLS wants it: what would wait is [`ErrorKind::WouldBlock`], and the task is woken
/// when it is worth while to try again.
struct Raw<'a, 'b, S> {
    stream: &'a mut S,
    context: &'a mut Context<'b>,
}

fn now_or_never(poll: Poll<Result<usize>>) -> Result<usize> {
    match poll {
        Poll::Ready(result) => result,
        Poll::Pending => Err(ErrorKind::WouldBlock.into()),
    }
}

impl<S: AsyncRead + Unpin> Read for Raw<'_, '_, S> {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        now_or_never(Pin::new(&mut *self.stream).poll_read(self.context, out))
    }
}

impl<S: AsyncWrite + Unpin> Write for Raw<'_, '_, S> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        now_or_never(Pin::new(&mut *self.stream).poll_write(self.context, bytes))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Gives everything that TLS has to send to the socket.
fn poll_send<S: AsyncWrite + Unpin>(
    tls: &mut ServerConnection,
    stream: &mut S,
    context: &mut Context<'_>,
) -> Poll<Result<()>> {
    while tls.wants_write() {
        match tls.write_tls(&mut Raw { stream: &mut *stream, context: &mut *context }) {
            Ok(0) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Poll::Pending,
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
    Poll::Ready(Ok(()))
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<Result<usize>> {
        let Socket { raw, tls, .. } = self.get_mut();
        let Some(tls) = tls else { return Pin::new(raw).poll_read(context, out) };
        loop {
            match tls.reader().read(out) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // The client has gone without saying so.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Poll::Ready(Ok(0));
                }
                read => return Poll::Ready(read),
            }
            // The handshake's answers; if they have to wait, what comes in need not.
            if let Poll::Ready(Err(error)) = poll_send(tls, raw, context) {
                return Poll::Ready(Err(error));
            }
            match tls.read_tls(&mut Raw { stream: &mut *raw, context: &mut *context }) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
            if let Err(error) = tls.process_new_packets() {
                // Why, as far as the client can still be told.
                let _ = poll_send(tls, raw, context);
                return Poll::Ready(Err(Error::new(ErrorKind::InvalidData, error)));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let Socket { raw, tls, .. } = self.get_mut();
        let Some(tls) = tls else { return Pin::new(raw).poll_write(context, bytes) };
        // What was taken before goes first: TLS never holds more than it takes at once.
        ready!(poll_send(tls, raw, context))?;
        let taken = tls.writer().write(bytes)?;
        match poll_send(tls, raw, context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(taken)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let Socket { raw, tls, .. } = self.get_mut();
        if let Some(tls) = tls {
            ready!(poll_send(tls, raw, context))?;
        }
        Pin::new(raw).poll_flush(context)
    }

    /// Says good-bye, so that the client can tell the end from a cut.
    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let Socket { raw, tls, .. } = self.get_mut();
        if let Some(tls) = tls {
            tls.send_close_notify();
            ready!(poll_send(tls, raw, context))?;
        }
        Pin::new(raw).poll_close(context)
    }
}
