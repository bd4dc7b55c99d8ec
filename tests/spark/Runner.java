import com.fasterxml.jackson.core.json.JsonWriteFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.json.JsonMapper;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.ZoneOffset;
import java.time.temporal.ChronoUnit;
import java.util.ArrayList;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.apache.spark.sql.Row;
import org.apache.spark.sql.SparkSession;
import scala.jdk.javaapi.CollectionConverters;

/**
 * Runs SQL in one local Spark session: a statement per line of stdin as a JSON string, an answer per line of stdout,
 * {"rows": [...]} or {"error": "..."}. Ends with stdin. Settings of the session are the arguments, each KEY=VALUE.
 */
public class Runner {
  public static void main(String[] settings) throws Exception {
    PrintStream answers = System.out;
    System.setOut(System.err); // whatever Spark prints is no answer
    SparkSession.Builder builder = SparkSession.builder();
    for (String setting : settings) {
      String[] parts = setting.split("=", 2);
      builder.config(parts[0], parts[1]);
    }
    ObjectMapper json = JsonMapper.builder().disable(JsonWriteFeature.WRITE_NAN_AS_STRINGS).build();
    try (SparkSession spark = builder.getOrCreate()) {
      answers.println(json.writeValueAsString(Map.of("version", spark.version())));
      answers.flush();
      BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
      for (String line = lines.readLine(); line != null; line = lines.readLine()) {
        answers.println(json.writeValueAsString(answer(spark, json.readValue(line, String.class))));
        answers.flush();
      }
    }
  }

  private static Map<String, Object> answer(SparkSession spark, String statement) {
    try {
      List<Object> rows = new ArrayList<>();
      for (Row row : spark.sql(statement).collectAsList()) {
        rows.add(plain(row));
      }
      return Map.of("rows", rows);
    } catch (Throwable error) {
      error.printStackTrace();
      return Map.of("error", error.toString());
    }
  }

  /** A value as JSON can carry it; what JSON has no type for is an object with one field that names the type. */
  private static Object plain(Object value) {
    if (value instanceof Row row) {
      Map<String, Object> fields = new LinkedHashMap<>();
      for (int index = 0; index < row.size(); index++) {
        fields.put(row.schema().fieldNames()[index], plain(row.get(index)));
      }
      return fields;
    }
    if (value instanceof scala.collection.Seq<?> items) {
      return CollectionConverters.asJava(items).stream().map(Runner::plain).toList();
    }
    if (value instanceof scala.collection.Map<?, ?> entries) {
      Map<String, Object> fields = new LinkedHashMap<>();
      CollectionConverters.asJava(entries).forEach((key, item) -> fields.put(String.valueOf(key), plain(item)));
      return fields;
    }
    if (value instanceof Instant moment) {
      return Map.of("$timestamp", ChronoUnit.MICROS.between(Instant.EPOCH, moment));
    }
    if (value instanceof LocalDateTime moment) {
      return Map.of("$timestamp_ntz", ChronoUnit.MICROS.between(Instant.EPOCH, moment.toInstant(ZoneOffset.UTC)));
    }
    if (value instanceof LocalDate day) {
      return Map.of("$date", day.toString());
    }
    if (value instanceof BigDecimal number) {
      return Map.of("$decimal", number.toPlainString());
    }
    if (value instanceof byte[] bytes) {
      return Map.of("$binary", Base64.getEncoder().encodeToString(bytes));
    }
    if (value instanceof Float number) {
      return number.doubleValue(); // every digit of the float, not its shortest name
    }
    return value;
  }
}
