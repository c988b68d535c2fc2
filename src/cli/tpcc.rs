//! A load like TPC-C: orders, payments and deliveries of warehouses, by functions in the database
//! that pgbench calls at random. Tables and SQL are our own, smaller than the benchmark's, and no
//! result of it may be compared with those of TPC-C.
//!
//! | transaction | share | what it writes |
//! |---|---|---|
//! | new order | 45 % | district, an order with 5 to 15 lines, stock of each; one in a hundred is undone |
//! | payment | 43 % | warehouse, district, customer (by name or number), history |
//! | order status | 4 % | nothing |
//! | delivery | 4 % | oldest order of each district: order, lines, customer |
//! | stock level | 4 % | nothing |
//!
//! Rows are locked in one order everywhere, so transactions wait for each other but never deadlock.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::path::Path;

use super::pg::{PgCluster, PgError, give_to_servers, make_dir};

/// The database that the load lives in.
pub const DATABASE: &str = "tpcc";

/// Items, and rows of stock of each warehouse.
const ITEMS: &str = "10000";
/// Customers of a district, each with one order to begin with.
const CUSTOMERS: &str = "300";

/// Scripts of pgbench with their weights; the variable `w` is the number of warehouses.
const SCRIPTS: [(&str, u32, &str); 5] = [
    ("new_order", 45, "SELECT new_order(:home, :district, :customer, :lines, :w, :undone = 1);"),
    ("payment", 43, "SELECT payment(:home, :district, :customer, :by_name <= 60, :lines * 100);"),
    ("order_status", 4, "SELECT order_status(:home, :district, :customer);"),
    ("delivery", 4, "SELECT delivery(:home, :lines % 10 + 1);"),
    ("stock_level", 4, "SELECT stock_level(:home, :district, :lines + 10);"),
];

const VARIABLES: &str = "\\set home random(1, :w)
\\set district random(1, 10)
\\set customer random_zipfian(1, @CUSTOMERS@, 1.05)
\\set lines random(5, 15)
\\set undone random(1, 100)
\\set by_name random(1, 100)
";

fn filled_in(sql: &str, warehouses: u32) -> String {
    sql.replace("@W@", &warehouses.to_string())
        .replace("@ITEMS@", ITEMS)
        .replace("@CUSTOMERS@", CUSTOMERS)
}

/// Makes the database with its rows. A warehouse takes 10 MB.
pub fn init(primary: &PgCluster, warehouses: u32) -> Result<(), PgError> {
    primary.psql("postgres", &format!("CREATE DATABASE {DATABASE}"))?;
    primary.psql(DATABASE, &filled_in(TABLES, warehouses))?;
    primary.psql(DATABASE, &filled_in(FUNCTIONS, warehouses)).map(drop)
}

/// Runs `transactions` of each of four clients. `dir` is made for the scripts.
pub fn run(
    primary: &PgCluster,
    dir: &Path,
    warehouses: u32,
    transactions: u32,
) -> Result<(), PgError> {
    make_dir(dir)?;
    let mut files = Vec::new();
    for (name, weight, call) in SCRIPTS {
        let path = dir.join(format!("{name}.sql"));
        let script = filled_in(VARIABLES, warehouses) + call + "\n";
        std::fs::write(&path, script).map_err(PgError::os(path.display().to_string()))?;
        give_to_servers(&path)?;
        files.push(format!("{}@{weight}", path.display()));
    }
    let (warehouses, transactions) = (format!("w={warehouses}"), transactions.to_string());
    let mut args = vec!["-n", "-c", "4", "-j", "1", "-t", &transactions, "-D", &warehouses];
    args.extend(files.iter().flat_map(|file| ["-f", file.as_str()]));
    primary.pgbench(DATABASE, &args, |_| {})
}

const TABLES: &str = "
CREATE TABLE warehouse (w_id int PRIMARY KEY, w_name text, w_tax numeric(4, 4),
    w_paid numeric(14, 2)) WITH (fillfactor = 50);
CREATE TABLE district (w_id int, d_id int, d_name text, d_tax numeric(4, 4),
    d_paid numeric(14, 2), next_order int, PRIMARY KEY (w_id, d_id)) WITH (fillfactor = 50);
CREATE TABLE customer (w_id int, d_id int, c_id int, first text, last text, credit char(2),
    discount numeric(4, 4), balance numeric(12, 2), paid numeric(12, 2), payments int,
    deliveries int, notes text, PRIMARY KEY (w_id, d_id, c_id));
CREATE TABLE history (w_id int, d_id int, c_id int, at timestamptz, amount numeric(8, 2),
    text text);
CREATE TABLE orders (w_id int, d_id int, o_id int, c_id int, at timestamptz, carrier int,
    lines int, PRIMARY KEY (w_id, d_id, o_id));
CREATE TABLE new_orders (w_id int, d_id int, o_id int, PRIMARY KEY (w_id, d_id, o_id));
CREATE TABLE order_line (w_id int, d_id int, o_id int, line int, i_id int, supplied_by int,
    delivered timestamptz, quantity int, amount numeric(8, 2), info text,
    PRIMARY KEY (w_id, d_id, o_id, line));
CREATE TABLE item (i_id int PRIMARY KEY, name text, price numeric(6, 2), notes text);
CREATE TABLE stock (w_id int, i_id int, quantity int, info text, sold int, orders int,
    remote int, notes text, PRIMARY KEY (w_id, i_id));

INSERT INTO warehouse SELECT w, 'warehouse ' || w, w % 20 / 100.0, 0
    FROM generate_series(1, @W@) w;
INSERT INTO district SELECT w, d, 'district ' || d, d % 20 / 100.0, 0, @CUSTOMERS@ + 1
    FROM generate_series(1, @W@) w, generate_series(1, 10) d;
INSERT INTO customer SELECT w, d, c, md5(c || 'first'), 'name' || c % 60,
        CASE WHEN c % 10 = 0 THEN 'BC' ELSE 'GC' END, c % 50 / 100.0, -10, 10, 1, 0,
        repeat(md5(c::text), 8)
    FROM generate_series(1, @W@) w, generate_series(1, 10) d, generate_series(1, @CUSTOMERS@) c;
INSERT INTO history SELECT w_id, d_id, c_id, now(), 10, 'first payment' FROM customer;
INSERT INTO orders SELECT w_id, d_id, c_id, (c_id * 7919) % @CUSTOMERS@ + 1, now(),
        CASE WHEN c_id < @CUSTOMERS@ * 0.7 THEN c_id % 10 + 1 END, c_id % 11 + 5 FROM customer;
INSERT INTO new_orders SELECT w_id, d_id, o_id FROM orders WHERE carrier IS NULL;
INSERT INTO order_line SELECT w_id, d_id, o_id, line, (o_id * 31 + line * 977) % @ITEMS@ + 1, w_id,
        CASE WHEN carrier IS NOT NULL THEN now() END, 5, line * 13.5, md5(line::text)
    FROM orders, generate_series(1, lines) line;
INSERT INTO item SELECT i, 'item ' || i, i % 9900 / 100.0 + 1, repeat('i', i % 30 + 20)
    FROM generate_series(1, @ITEMS@) i;
INSERT INTO stock SELECT w, i, i % 90 + 10, md5(i::text), 0, 0, 0, repeat('s', i % 30 + 20)
    FROM generate_series(1, @W@) w, generate_series(1, @ITEMS@) i;
CREATE INDEX customer_name ON customer (w_id, d_id, last, first);
CREATE INDEX orders_customer ON orders (w_id, d_id, c_id, o_id);
VACUUM ANALYZE;
";

const FUNCTIONS: &str = "
CREATE FUNCTION new_order(home int, district_id int, buyer int, line_count int, warehouses int,
    undone bool) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    number int; wanted int[]; from_warehouse int; cost numeric; line int := 0; bought int;
BEGIN
    -- In the order of the items, so that two orders do not deadlock.
    SELECT array_agg(i ORDER BY i) INTO wanted FROM (
        SELECT DISTINCT (floor(random() * 256)::int | floor(random() * @ITEMS@)::int)
            % @ITEMS@ + 1 AS i FROM generate_series(1, line_count)) drawn;
    BEGIN
        UPDATE district SET next_order = next_order + 1
            WHERE w_id = home AND d_id = district_id RETURNING next_order - 1 INTO number;
        INSERT INTO orders VALUES (home, district_id, number, buyer, now(), NULL,
            array_length(wanted, 1));
        INSERT INTO new_orders VALUES (home, district_id, number);
        FOREACH bought IN ARRAY wanted LOOP
            line := line + 1;
            from_warehouse := home;
            IF line_count = 15 AND line = 1 THEN
                from_warehouse := home % warehouses + 1;
            END IF;
            SELECT price * line INTO cost FROM item WHERE i_id = bought;
            UPDATE stock SET quantity = CASE WHEN quantity > line + 10 THEN quantity - line
                    ELSE quantity - line + 91 END,
                sold = sold + line, orders = orders + 1,
                remote = remote + (from_warehouse <> home)::int
                WHERE w_id = from_warehouse AND i_id = bought;
            INSERT INTO order_line VALUES (home, district_id, number, line, bought,
                from_warehouse, NULL, line, cost, md5(bought::text));
        END LOOP;
        IF undone THEN
            RAISE EXCEPTION 'the last item does not exist' USING ERRCODE = 'no_data_found';
        END IF;
    EXCEPTION WHEN no_data_found THEN
        RETURN 0;
    END;
    RETURN number;
END $$;

CREATE FUNCTION payment(home int, district_id int, payer int, by_name bool, cents int)
    RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    who int := payer; sum numeric := cents / 100.0;
BEGIN
    UPDATE warehouse SET w_paid = w_paid + sum WHERE w_id = home;
    UPDATE district SET d_paid = d_paid + sum WHERE w_id = home AND d_id = district_id;
    IF by_name THEN
        SELECT c_id INTO who FROM customer
            WHERE w_id = home AND d_id = district_id AND last = 'name' || payer % 60
            ORDER BY first OFFSET 2 LIMIT 1;
    END IF;
    UPDATE customer SET balance = balance - sum, paid = paid + sum, payments = payments + 1,
        notes = CASE WHEN credit = 'BC' THEN left(who || ' ' || sum || ' ' || notes, 250)
            ELSE notes END
        WHERE w_id = home AND d_id = district_id AND c_id = who;
    INSERT INTO history VALUES (home, district_id, who, now(), sum, 'payment');
    RETURN who;
END $$;

CREATE FUNCTION order_status(home int, district_id int, buyer int) RETURNS numeric
    LANGUAGE sql AS $$
    SELECT sum(amount) FROM order_line
        WHERE w_id = home AND d_id = district_id AND o_id = (
            SELECT max(o_id) FROM orders
                WHERE w_id = home AND d_id = district_id AND c_id = buyer) $$;

CREATE FUNCTION delivery(home int, carried_by int) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    number int; buyer int; due numeric; done int := 0;
BEGIN
    FOR district_id IN 1..10 LOOP
        DELETE FROM new_orders WHERE w_id = home AND d_id = district_id AND o_id = (
            SELECT o_id FROM new_orders WHERE w_id = home AND d_id = district_id
                ORDER BY o_id LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING o_id INTO number;
        CONTINUE WHEN number IS NULL;
        UPDATE orders SET carrier = carried_by
            WHERE w_id = home AND d_id = district_id AND o_id = number RETURNING c_id INTO buyer;
        UPDATE order_line SET delivered = now()
            WHERE w_id = home AND d_id = district_id AND o_id = number;
        SELECT sum(amount) INTO due FROM order_line
            WHERE w_id = home AND d_id = district_id AND o_id = number;
        UPDATE customer SET balance = balance + due, deliveries = deliveries + 1
            WHERE w_id = home AND d_id = district_id AND c_id = buyer;
        done := done + 1;
    END LOOP;
    RETURN done;
END $$;

CREATE FUNCTION stock_level(home int, district_id int, few int) RETURNS bigint
    LANGUAGE sql AS $$
    SELECT count(DISTINCT s.i_id) FROM order_line l
        JOIN district d ON d.w_id = home AND d.d_id = district_id
        JOIN stock s ON s.w_id = home AND s.i_id = l.i_id AND s.quantity < few
        WHERE l.w_id = home AND l.d_id = district_id
            AND l.o_id BETWEEN d.next_order - 20 AND d.next_order - 1 $$;
";
