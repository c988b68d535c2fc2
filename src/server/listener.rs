//! Connections of one core: accepted here or handed over by another core.

#![allow(clippy::disallowed_methods, reason = "connections belong to the executor, not to a shard")]

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::AsyncWriteExt;
use glommio::net::{TcpListener, TcpStream};

use crate::limits::{
    CONNECTION_IDLE_MS_MAX, CONNECTION_WRITE_MS_MAX, CONNECTIONS_PER_CORE_MAX, LISTEN_PROBE_MS_MAX,
};
use crate::server::counters::count;
use crate::server::mesh::{Connection, Mesh, Message};
use crate::server::page_service::{End, Service, Session, serve};
use crate::server::pq::{Severity, SqlState, put_error};
use crate::server::socket::Socket;
use crate::shard::reader::PageBackend;

/// Opens the core's listening socket. All cores may listen at one address (`SO_REUSEPORT`); the
/// kernel deals connections out among them.
///
/// # Errors
/// The operating system's words.
pub fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), String> {
    let listener = TcpListener::bind(address)
        .map_err(|error| format!("cannot listen at {address}: {error}"))?;
    let bound = listener.local_addr().map_err(|error| error.to_string())?;
    Ok((listener, bound))
}

/// Makes sure that no other program listens at `address`: with `SO_REUSEPORT` the kernel would let
/// it have a part of the connections. Asked before the first of the cores listens.
///
/// A socket without that option cannot be bound where old connections of an earlier node still
/// linger, so this tries whether somebody answers.
///
/// # Errors
/// Somebody does.
pub fn check_free(address: SocketAddr) -> Result<(), String> {
    let limit = Duration::from_millis(LISTEN_PROBE_MS_MAX);
    let answers = std::net::TcpStream::connect_timeout(&address, limit);
    // The kernel may connect a socket with itself.
    match answers.and_then(|stream| Ok(stream.local_addr()? == stream.peer_addr()?)) {
        Ok(false) => Err(format!("cannot listen at {address}: another program does already")),
        Ok(true) | Err(_) => Ok(()),
    }
}

/// Accepts until the service's `stop` closes.
pub async fn accept<B: PageBackend>(listener: TcpListener, service: Rc<Service<B>>, mesh: Mesh) {
    loop {
        let accepted = std::pin::pin!(listener.accept());
        let stop = std::pin::pin!(service.stop.recv());
        match futures_util::future::select(accepted, stop).await {
            futures_util::future::Either::Left((Ok(stream), _)) => {
                count(&service.counters.accepted);
                let socket = Socket::new(stream, service.tls.clone(), None);
                run(socket, Session::default(), service.clone(), mesh.clone());
            }
            futures_util::future::Either::Left((Err(error), _)) => {
                // Out of file descriptors, or the client is gone already.
                if let Some(kept_back) = service.counters.refusals_told.pass((service.now)()) {
                    tracing::warn!(kept_back, "cannot accept a connection: {error}");
                }
                glommio::timer::sleep(Duration::from_millis(20)).await;
            }
            futures_util::future::Either::Right(_) => return,
        }
    }
}

/// Goes on with a connection that another core handed over.
pub fn adopt<B: PageBackend>(connection: Connection, service: Rc<Service<B>>, mesh: Mesh) {
    let Connection { fd, tls, session } = connection;
    let socket = Socket::new(take_fd(fd), service.tls.clone(), tls);
    run(socket, session, service, mesh);
}

fn run<B: PageBackend>(
    mut socket: Socket<TcpStream>,
    session: Session,
    service: Rc<Service<B>>,
    mesh: Mesh,
) {
    let open = &service.counters.open;
    if open.get() >= CONNECTIONS_PER_CORE_MAX as u64 {
        refuse(socket, &service);
        return;
    }
    open.set(open.get() + 1);
    let stream = socket.raw();
    // Failing to set these costs speed or patience, not correctness.
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(CONNECTION_IDLE_MS_MAX)));
    let _ = stream.set_write_timeout(Some(Duration::from_millis(CONNECTION_WRITE_MS_MAX)));
    glommio::spawn_local(async move {
        match serve(&mut socket, session, &service).await {
            End::Closed if socket.is_encrypted() => {
                // The client may be gone.
                let _ = socket.close().await;
            }
            End::Closed => {}
            End::Move { target, session } => {
                let (stream, tls) = socket.into_parts();
                match give_fd(stream) {
                    Ok(fd) => {
                        count(&service.counters.moved);
                        let message = Message::Adopt(Connection { fd, tls, session: *session });
                        if let Err(error) = mesh.send(target, message) {
                            tracing::warn!("connection dropped: {error}");
                        }
                    }
                    Err(error) => tracing::warn!("connection cannot be moved: {error}"),
                }
            }
        }
        let open = &service.counters.open;
        open.set(open.get() - 1);
    })
    .detach();
}

/// Says why, as PostgreSQL does. The few bytes always fit into a new socket's buffer.
fn refuse<B: PageBackend>(mut socket: Socket<TcpStream>, service: &Service<B>) {
    let text = format!("too many connections: this core serves {CONNECTIONS_PER_CORE_MAX}");
    if let Some(kept_back) = service.counters.refusals_told.pass((service.now)()) {
        tracing::warn!(kept_back, "{text}");
    }
    let mut out = BytesMut::new();
    put_error(&mut out, Severity::Fatal, SqlState::TOO_MANY_CONNECTIONS, &text);
    let limit = Duration::from_millis(CONNECTION_WRITE_MS_MAX);
    let _ = socket.raw().set_write_timeout(Some(limit));
    glommio::spawn_local(async move {
        // The client may be gone.
        let _ = socket.write_all(&out).await;
        let _ = socket.flush().await;
    })
    .detach();
}

/// The socket without the executor that it was registered with. Reads in glommio wait for
/// readiness and then call `recv`, so none that is under way can hold bytes.
#[allow(unsafe_code, reason = "glommio's sockets give out their descriptor only as a number")]
fn give_fd(stream: TcpStream) -> std::io::Result<OwnedFd> {
    // SAFETY: the descriptor is open as long as `stream` lives, which is to the end of this
    // function, and the borrow ends before that.
    let borrowed = unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) };
    borrowed.try_clone_to_owned()
}

#[allow(unsafe_code, reason = "glommio's sockets are made from a number")]
fn take_fd(fd: OwnedFd) -> TcpStream {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, and the stream takes it.
    unsafe { TcpStream::from_raw_fd(fd.into_raw_fd()) }
}
